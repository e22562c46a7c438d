/** Paint an inpainting mask: a canvas at the resolution of the image, in a dialog. */
import { useEffect, useRef, useState } from 'preact/hooks';
import { addImage, loadImage, reference, type InputImage } from './images';
import { edit } from './state';

const MOST_UNDO = 20;
const PAINT = '#ff2d55';

interface Point {
  x: number;
  y: number;
}

/** The alpha of the painted layer from the brightness of a mask. */
async function drawMask(pen: CanvasRenderingContext2D, mask: InputImage): Promise<void> {
  const { width, height } = pen.canvas;
  pen.drawImage(await loadImage(mask.dataUri), 0, 0, width, height);
  const data = pen.getImageData(0, 0, width, height);
  for (let i = 0; i < data.data.length; i += 4) data.data.set([255, 45, 85, data.data[i] ?? 0], i);
  pen.putImageData(data, 0, 0);
}

/** White where the layer is painted, black elsewhere, as the request wants it. */
function maskOf(layer: HTMLCanvasElement): string {
  const canvas = document.createElement('canvas');
  [canvas.width, canvas.height] = [layer.width, layer.height];
  const pen = canvas.getContext('2d');
  if (!pen) throw new Error('the browser has no canvas');
  pen.drawImage(layer, 0, 0);
  pen.globalCompositeOperation = 'source-in';
  pen.fillStyle = '#fff';
  pen.fillRect(0, 0, canvas.width, canvas.height);
  pen.globalCompositeOperation = 'destination-over';
  pen.fillStyle = '#000';
  pen.fillRect(0, 0, canvas.width, canvas.height);
  return canvas.toDataURL('image/png');
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
  const undo = useRef<ImageData[]>([]);
  const last = useRef<Point | null>(null);
  const [erase, setErase] = useState(false);
  const [size, setSize] = useState(Math.max(4, Math.round(Math.min(image.width, image.height) / 8)));

  const pen = () => {
    const found = layer.current?.getContext('2d', { willReadFrequently: true });
    if (!found) throw new Error('the browser has no canvas');
    return found;
  };
  useEffect(() => {
    dialog.current?.showModal();
    if (mask) void drawMask(pen(), mask);
  }, []);

  const keep = () => {
    undo.current = [...undo.current.slice(1 - MOST_UNDO), pen().getImageData(0, 0, image.width, image.height)];
  };
  const takeBack = () => {
    const before = undo.current.pop();
    if (before) pen().putImageData(before, 0, 0);
  };
  const change = (work: (pen: CanvasRenderingContext2D) => void) => {
    keep();
    const drawing = pen();
    drawing.save();
    work(drawing);
    drawing.restore();
  };
  const all = { x: 0, y: 0, width: image.width, height: image.height };
  const clear = () => change((drawing) => drawing.clearRect(all.x, all.y, all.width, all.height));
  const invert = () =>
    change((drawing) => {
      drawing.globalCompositeOperation = 'source-out';
      drawing.fillStyle = PAINT;
      drawing.fillRect(all.x, all.y, all.width, all.height);
    });

  const pointOf = (event: PointerEvent): Point => {
    const box = layer.current?.getBoundingClientRect();
    if (!box) return { x: 0, y: 0 };
    return {
      x: ((event.clientX - box.left) / box.width) * image.width,
      y: ((event.clientY - box.top) / box.height) * image.height,
    };
  };
  const stroke = (to: Point) => {
    const drawing = pen();
    const from = last.current ?? to;
    drawing.globalCompositeOperation = erase ? 'destination-out' : 'source-over';
    drawing.strokeStyle = PAINT;
    drawing.lineWidth = size;
    drawing.lineCap = drawing.lineJoin = 'round';
    drawing.beginPath();
    drawing.moveTo(from.x, from.y);
    drawing.lineTo(to.x, to.y);
    drawing.stroke();
    drawing.globalCompositeOperation = 'source-over';
    last.current = to;
  };
  const down = (event: PointerEvent) => {
    if (event.button !== 0) return;
    layer.current?.setPointerCapture(event.pointerId);
    keep();
    stroke(pointOf(event));
  };
  const move = (event: PointerEvent) => {
    const box = layer.current?.getBoundingClientRect();
    if (ring.current && box) {
      const across = `${(size * box.width) / image.width}px`;
      Object.assign(ring.current.style, {
        width: across,
        height: across,
        left: `${event.clientX - box.left}px`,
        top: `${event.clientY - box.top}px`,
      });
    }
    if (!last.current) return;
    for (const part of event.getCoalescedEvents?.() ?? []) stroke(pointOf(part));
    stroke(pointOf(event));
  };
  const up = () => (last.current = null);

  const key = (event: KeyboardEvent) => {
    const grow = { '[': 0.8, ']': 1.25 }[event.key];
    if (grow) setSize((now) => Math.min(image.width, Math.max(1, Math.round(now * grow))));
    else if (event.key === 'e') setErase((now) => !now);
    else if (event.key === 'z' && (event.ctrlKey || event.metaKey)) takeBack();
    else return;
    event.preventDefault();
  };
  const done = async () => {
    if (!layer.current) return;
    edit(path, reference(await addImage(maskOf(layer.current))));
    dialog.current?.close();
  };
  return (
    <dialog ref={dialog} class="mask-editor" aria-label="Paint the mask" onClose={onClose} onKeyDown={key}>
      <div class="mask-tools" role="toolbar" aria-label="Mask tools">
        <button type="button" aria-pressed={!erase} onClick={() => setErase(false)}>
          Paint
        </button>
        <button type="button" aria-pressed={erase} onClick={() => setErase(true)}>
          Erase
        </button>
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
        <button type="button" onClick={takeBack}>
          Undo
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
      <div class="mask-stage">
        <div
          class="mask-image"
          style={{ aspectRatio: `${image.width} / ${image.height}`, '--ratio': image.width / image.height }}
        >
          <img src={image.dataUri} alt="The image below the mask" draggable={false} />
          <canvas
            ref={layer}
            width={image.width}
            height={image.height}
            aria-label="Mask: what is painted is repainted"
            onPointerDown={down}
            onPointerMove={move}
            onPointerUp={up}
            onPointerCancel={up}
          />
          <div ref={ring} class="ring" aria-hidden="true" />
        </div>
      </div>
      <p class="note">
        Paint the mask. <kbd>[</kbd> <kbd>]</kbd> brush size, <kbd>E</kbd> erase, <kbd>Ctrl</kbd> <kbd>Z</kbd> undo.
      </p>
    </dialog>
  );
}
