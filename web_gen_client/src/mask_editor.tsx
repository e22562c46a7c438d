/** Paint an inpainting mask: a canvas at the resolution of the image, in a dialog; by mouse, touch, pen and keyboard. */
import { useEffect, useRef, useState } from 'preact/hooks';
import { addImage, loadImage, reference, type InputImage } from './images';
import { edit } from './state';

const MOST_UNDO = 20;
const ZOOMS = [1, 1.5, 2, 3, 4, 6, 8];

type Tool = 'paint' | 'erase' | 'fill';
interface Point {
  x: number;
  y: number;
}

/** Draw a mask into the layer, with its brightness as alpha. */
async function drawMask(pen: CanvasRenderingContext2D, mask: InputImage): Promise<void> {
  const { width, height } = pen.canvas;
  pen.drawImage(await loadImage(mask.dataUri), 0, 0, width, height);
  const data = pen.getImageData(0, 0, width, height);
  for (let i = 0; i < data.data.length; i += 4) data.data.set([255, 255, 255, data.data[i] ?? 0], i);
  pen.putImageData(data, 0, 0);
}

/** White where the layer is painted, black elsewhere, as the request wants it. */
function maskOf(layer: HTMLCanvasElement): string {
  const canvas = document.createElement('canvas');
  canvas.width = layer.width;
  canvas.height = layer.height;
  const pen = canvas.getContext('2d');
  if (!pen) throw new Error('the browser has no canvas');
  pen.drawImage(layer, 0, 0);
  tint(pen, '#fff');
  pen.globalCompositeOperation = 'destination-over';
  pen.fillStyle = '#000';
  pen.fillRect(0, 0, canvas.width, canvas.height);
  return canvas.toDataURL('image/png');
}

/** Recolor the painted area. */
function tint(pen: CanvasRenderingContext2D, color: string): void {
  pen.save();
  pen.globalCompositeOperation = 'source-in';
  pen.fillStyle = color;
  pen.fillRect(0, 0, pen.canvas.width, pen.canvas.height);
  pen.restore();
}

/** Scanline flood fill of the unpainted area around a point. */
function floodFill(pen: CanvasRenderingContext2D, start: Point): void {
  const { width, height } = pen.canvas;
  const image = pen.getImageData(0, 0, width, height);
  const words = new Uint32Array(image.data.buffer);
  const isFree = (at: number) => (image.data[at * 4 + 3] ?? 255) < 128;
  const first = Math.floor(start.y) * width + Math.floor(start.x);
  if (start.x < 0 || start.y < 0 || start.x >= width || start.y >= height || !isFree(first)) return;
  const open = [first];
  while (open.length) {
    const at = open.pop() ?? 0;
    if (!isFree(at)) continue;
    const row = at - (at % width);
    let left = at;
    while (left > row && isFree(left - 1)) left--;
    let right = at;
    while (right < row + width - 1 && isFree(right + 1)) right++;
    words.fill(0xffffffff, left, right + 1);
    for (const next of [left - width, left + width])
      if (next >= 0 && next < words.length)
        for (let other = next; other <= next + right - left; other++)
          if (isFree(other) && (other === next || !isFree(other - 1))) open.push(other);
  }
  pen.putImageData(image, 0, 0);
}

interface MaskEditorProps {
  image: InputImage;
  mask: InputImage | undefined;
  /** Where the mask goes */
  path: string;
  onClose: () => void;
}

export function MaskEditor({ image, mask, path, onClose }: MaskEditorProps) {
  const dialog = useRef<HTMLDialogElement>(null);
  const layer = useRef<HTMLCanvasElement>(null);
  const ring = useRef<HTMLDivElement>(null);
  const scroll = useRef<HTMLDivElement>(null);
  const past = useRef<ImageData[]>([]);
  const future = useRef<ImageData[]>([]);
  const last = useRef<Point | null>(null);
  const cursor = useRef<Point>({ x: image.width / 2, y: image.height / 2 });
  const pressed = useRef(false); // the space bar
  const pointers = useRef(new Map<number, Point>());
  const [tool, setTool] = useState<Tool>('paint');
  const [size, setSize] = useState(Math.max(4, Math.round(Math.min(image.width, image.height) / 8)));
  const [color, setColor] = useState('#ff2d55');
  const [opacity, setOpacity] = useState(60);
  const [zoom, setZoom] = useState(1);
  const [steps, setSteps] = useState({ back: 0, forth: 0 });

  const pen = () => {
    const found = layer.current?.getContext('2d', { willReadFrequently: true });
    if (!found) throw new Error('the browser has no canvas');
    return found;
  };
  useEffect(() => {
    dialog.current?.showModal();
    layer.current?.focus();
    if (mask) void drawMask(pen(), mask).then(() => tint(pen(), color));
  }, []);
  useEffect(() => tint(pen(), color), [color]);

  const counted = () => setSteps({ back: past.current.length, forth: future.current.length });
  const now = () => pen().getImageData(0, 0, image.width, image.height);
  const keep = () => {
    past.current = [...past.current.slice(1 - MOST_UNDO), now()];
    future.current = [];
    counted();
  };
  const step = (from: ImageData[], to: ImageData[]) => {
    const shown = from.pop();
    if (!shown) return;
    to.push(now());
    pen().putImageData(shown, 0, 0);
    tint(pen(), color);
    counted();
  };
  const undo = () => step(past.current, future.current);
  const redo = () => step(future.current, past.current);
  const clear = () => {
    keep();
    pen().clearRect(0, 0, image.width, image.height);
  };
  const invert = () => {
    keep();
    const drawing = pen();
    drawing.save();
    drawing.globalCompositeOperation = 'source-out';
    drawing.fillStyle = color;
    drawing.fillRect(0, 0, image.width, image.height);
    drawing.restore();
  };
  const fill = (at: Point) => {
    keep();
    floodFill(pen(), at);
    tint(pen(), color);
  };

  const pointOf = (event: PointerEvent): Point => {
    const box = layer.current?.getBoundingClientRect();
    if (!box) return { x: 0, y: 0 };
    return {
      x: ((event.clientX - box.left) / box.width) * image.width,
      y: ((event.clientY - box.top) / box.height) * image.height,
    };
  };
  const stroke = (to: Point, pressure = 1) => {
    const drawing = pen();
    const from = last.current ?? to;
    drawing.globalCompositeOperation = tool === 'erase' ? 'destination-out' : 'source-over';
    drawing.strokeStyle = color;
    drawing.lineWidth = Math.max(1, size * pressure);
    drawing.lineCap = drawing.lineJoin = 'round';
    drawing.beginPath();
    drawing.moveTo(from.x, from.y);
    drawing.lineTo(to.x + (from === to ? 0.001 : 0), to.y); // a zero-length line would not be drawn
    drawing.stroke();
    drawing.globalCompositeOperation = 'source-over';
    last.current = to;
  };
  const pressureOf = (event: PointerEvent) => (event.pointerType === 'pen' ? 0.3 + 0.7 * event.pressure : 1);
  const showRing = () => {
    const box = layer.current?.getBoundingClientRect();
    if (!ring.current || !box) return;
    const scale = box.width / image.width;
    const across = `${size * scale}px`;
    const { x, y } = cursor.current;
    Object.assign(ring.current.style, { width: across, height: across, left: `${x * scale}px`, top: `${y * scale}px` });
  };
  useEffect(showRing, [size, zoom]);

  const down = (event: PointerEvent) => {
    if (event.button !== 0) return;
    layer.current?.setPointerCapture(event.pointerId);
    pointers.current.set(event.pointerId, { x: event.clientX, y: event.clientY });
    if (pointers.current.size === 2) {
      if (last.current) undo(); // drop the stroke started by the first finger of a pinch
      last.current = null;
      return;
    }
    if (tool === 'fill') return fill(pointOf(event));
    keep();
    stroke(pointOf(event), pressureOf(event));
  };
  const move = (event: PointerEvent) => {
    const before = pointers.current.get(event.pointerId);
    if (before) pointers.current.set(event.pointerId, { x: event.clientX, y: event.clientY });
    if (pointers.current.size === 2 && before) {
      const other = [...pointers.current].find(([id]) => id !== event.pointerId)?.[1];
      scroll.current?.scrollBy(before.x - event.clientX, before.y - event.clientY);
      if (!other) return;
      const was = Math.hypot(before.x - other.x, before.y - other.y);
      const is = Math.hypot(event.clientX - other.x, event.clientY - other.y);
      if (was) setZoom((old) => Math.min(8, Math.max(1, old * (is / was))));
      return;
    }
    cursor.current = pointOf(event);
    showRing();
    if (!last.current) return;
    for (const part of event.getCoalescedEvents?.() ?? []) stroke(pointOf(part), pressureOf(part));
    stroke(pointOf(event), pressureOf(event));
  };
  const up = (event: PointerEvent) => {
    pointers.current.delete(event.pointerId);
    last.current = null;
  };

  const zoomBy = (way: 1 | -1) =>
    setZoom((old) => (way > 0 ? ZOOMS.find((known) => known > old) : ZOOMS.findLast((known) => known < old)) ?? old);
  const onCanvas = (event: KeyboardEvent) => {
    const far = event.shiftKey ? 1 : Math.max(1, size / 4);
    const way = { ArrowLeft: [-far, 0], ArrowRight: [far, 0], ArrowUp: [0, -far], ArrowDown: [0, far] }[event.key];
    if (way) {
      const { x, y } = cursor.current;
      cursor.current = {
        x: Math.min(image.width, Math.max(0, x + (way[0] ?? 0))),
        y: Math.min(image.height, Math.max(0, y + (way[1] ?? 0))),
      };
      showRing();
      if (pressed.current) stroke(cursor.current);
    } else if (event.key === ' ') {
      if (!event.repeat && tool === 'fill') fill(cursor.current);
      else if (!pressed.current && tool !== 'fill') {
        pressed.current = true;
        keep();
        stroke(cursor.current);
      }
    } else return false;
    return true;
  };
  const key = (event: KeyboardEvent) => {
    const command = event.ctrlKey || event.metaKey;
    const letter = event.key.toLowerCase();
    const grow = { '[': 0.8, ']': 1.25 }[event.key];
    const tools: Record<string, Tool> = { b: 'paint', e: 'erase', f: 'fill' };
    if (event.target === layer.current && !command && onCanvas(event)) event.preventDefault();
    else if (grow) setSize((old) => Math.min(image.width, Math.max(1, Math.round(old * grow))));
    else if (!command && tools[letter]) setTool(tools[letter]);
    else if (command && (letter === 'y' || (letter === 'z' && event.shiftKey))) redo();
    else if (command && letter === 'z') undo();
    else if (!command && (event.key === '+' || event.key === '-')) zoomBy(event.key === '+' ? 1 : -1);
    else return;
    event.preventDefault();
    event.stopPropagation();
  };
  const release = (event: KeyboardEvent) => {
    if (event.key !== ' ') return;
    pressed.current = false;
    last.current = null;
  };
  const done = async () => {
    if (!layer.current) return;
    edit(path, reference(await addImage(maskOf(layer.current))));
    dialog.current?.close();
  };
  const tools: [Tool, string][] = [
    ['paint', 'Paint'],
    ['erase', 'Erase'],
    ['fill', 'Fill'],
  ];
  return (
    <dialog
      ref={dialog}
      class="mask-editor"
      aria-label="Paint the mask"
      onClose={onClose}
      onKeyDown={key}
      onKeyUp={release}
    >
      <div class="mask-tools" role="toolbar" aria-label="Mask tools">
        <div class="segments" role="group" aria-label="Tool">
          {tools.map(([name, title]) => (
            <button type="button" key={name} aria-pressed={tool === name} onClick={() => setTool(name)}>
              {title}
            </button>
          ))}
        </div>
        <label class="brush">
          Brush{' '}
          <input
            type="range"
            min="1"
            max={Math.max(image.width, image.height) / 2}
            value={size}
            onInput={(event) => setSize(Number(event.currentTarget.value))}
          />{' '}
          <output>{size} px</output>
        </label>
        <button type="button" disabled={!steps.back} onClick={undo}>
          Undo
        </button>
        <button type="button" disabled={!steps.forth} onClick={redo}>
          Redo
        </button>
        <button type="button" onClick={invert}>
          Invert
        </button>
        <button type="button" onClick={clear}>
          Clear
        </button>
        <span class="spring" />
        <button type="button" onClick={() => dialog.current?.close()}>
          Cancel
        </button>
        <button type="button" class="primary" onClick={() => void done()}>
          Done
        </button>
      </div>
      <div ref={scroll} class="mask-stage">
        <div
          class="mask-image"
          style={{
            aspectRatio: `${image.width} / ${image.height}`,
            '--ratio': image.width / image.height,
            '--zoom': zoom,
          }}
        >
          <img src={image.dataUri} alt="The image below the mask" draggable={false} />
          <canvas
            ref={layer}
            width={image.width}
            height={image.height}
            tabIndex={0}
            role="application"
            aria-label="Mask: what is painted is repainted. Arrows move the brush, the space bar paints"
            style={{ opacity: opacity / 100 }}
            onPointerDown={down}
            onPointerMove={move}
            onPointerUp={up}
            onPointerCancel={up}
          />
          <div ref={ring} class="ring" aria-hidden="true" />
        </div>
      </div>
      <div class="mask-tools">
        <label class="brush-option">
          Color <input type="color" value={color} onInput={(event) => setColor(event.currentTarget.value)} />
        </label>
        <label class="brush-option">
          Opacity{' '}
          <input
            type="range"
            min="10"
            max="100"
            step="5"
            value={opacity}
            onInput={(event) => setOpacity(Number(event.currentTarget.value))}
          />
        </label>
        <div class="brush-option" role="group" aria-label="Zoom">
          <button type="button" aria-label="Zoom out" disabled={zoom <= 1} onClick={() => zoomBy(-1)}>
            −
          </button>
          <output>{Math.round(zoom * 100)} %</output>
          <button type="button" aria-label="Zoom in" disabled={zoom >= 8} onClick={() => zoomBy(1)}>
            +
          </button>
        </div>
        <p class="note keys">
          <kbd>[</kbd> <kbd>]</kbd> size, <kbd>B</kbd> <kbd>E</kbd> <kbd>F</kbd> tool, <kbd>←</kbd> <kbd>→</kbd> move,{' '}
          <kbd>Space</kbd> paint, <kbd>Ctrl</kbd> <kbd>Z</kbd> undo
        </p>
      </div>
    </dialog>
  );
}
