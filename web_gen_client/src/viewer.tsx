/** An image with zoom, pan and full screen, by mouse, touch, pen and keyboard. */
import type { ComponentChildren } from 'preact';
import { useEffect, useRef, useState } from 'preact/hooks';

interface Sight {
  /** 1 fits the image into its place */
  zoom: number;
  x: number;
  y: number;
}

const FIT: Sight = { zoom: 1, x: 0, y: 0 };
const MOST = 32;
const STEP = 1.25;

interface ViewerProps {
  source: string;
  name: string;
  /** Shows single pixels instead of smoothing */
  small: boolean;
  /** Further buttons beside those of the viewer */
  children?: ComponentChildren;
}

export function Viewer({ source, name, small, children }: ViewerProps) {
  const frame = useRef<HTMLDivElement>(null);
  const image = useRef<HTMLImageElement>(null);
  const pointers = useRef(new Map<number, { x: number; y: number }>());
  const [sight, setSight] = useState(FIT);
  const [fitted, setFitted] = useState(1); // screen pixels per image pixel when fitted

  const measure = () => {
    const [place, shown] = [frame.current, image.current];
    if (!place || !shown?.naturalWidth) return;
    setFitted(Math.min(place.clientWidth / shown.naturalWidth, place.clientHeight / shown.naturalHeight) || 1);
  };
  useEffect(() => {
    const watching = new ResizeObserver(measure);
    if (frame.current) watching.observe(frame.current);
    return () => watching.disconnect();
  }, []);

  /** Zoom around a point of the frame, by default its center. */
  const zoomTo = (wanted: number, at = { x: 0, y: 0 }) =>
    setSight((now) => {
      const zoom = Math.min(MOST, Math.max(1, wanted));
      if (zoom === 1) return FIT;
      const grown = zoom / now.zoom;
      return { zoom, x: at.x - (at.x - now.x) * grown, y: at.y - (at.y - now.y) * grown };
    });
  const fromMiddle = (event: { clientX: number; clientY: number }) => {
    const box = frame.current?.getBoundingClientRect();
    if (!box) return { x: 0, y: 0 };
    return { x: event.clientX - box.left - box.width / 2, y: event.clientY - box.top - box.height / 2 };
  };
  const latest = useRef(sight);
  latest.current = sight;
  useEffect(() => {
    const wheel = (event: WheelEvent) => {
      event.preventDefault();
      zoomTo(latest.current.zoom * (event.deltaY < 0 ? STEP : 1 / STEP), fromMiddle(event));
    };
    const element = frame.current;
    element?.addEventListener('wheel', wheel, { passive: false });
    return () => element?.removeEventListener('wheel', wheel);
  }, []);

  const down = (event: PointerEvent) => {
    if (event.button !== 0 || (event.target as HTMLElement).closest('button')) return;
    pointers.current.set(event.pointerId, { x: event.clientX, y: event.clientY });
    if (sight.zoom > 1) frame.current?.setPointerCapture(event.pointerId);
  };
  const move = (event: PointerEvent) => {
    const before = pointers.current.get(event.pointerId);
    if (!before) return;
    const now = { x: event.clientX, y: event.clientY };
    const other = [...pointers.current].find(([id]) => id !== event.pointerId)?.[1];
    pointers.current.set(event.pointerId, now);
    if (other) {
      const [was, is] = [before, now].map((point) => Math.hypot(point.x - other.x, point.y - other.y));
      const middle = { clientX: (now.x + other.x) / 2, clientY: (now.y + other.y) / 2 };
      if (was && is) zoomTo(latest.current.zoom * (is / was), fromMiddle(middle));
    } else if (latest.current.zoom > 1) {
      setSight((old) => ({ ...old, x: old.x + now.x - before.x, y: old.y + now.y - before.y }));
    }
  };
  const up = (event: PointerEvent) => pointers.current.delete(event.pointerId);

  const key = (event: KeyboardEvent) => {
    if (event.target !== frame.current || event.ctrlKey || event.metaKey || event.altKey) return;
    const step = { ArrowLeft: [40, 0], ArrowRight: [-40, 0], ArrowUp: [0, 40], ArrowDown: [0, -40] }[event.key];
    if (event.key === '+' || event.key === '=') zoomTo(sight.zoom * STEP);
    else if (event.key === '-') zoomTo(sight.zoom / STEP);
    else if (event.key === '0') setSight(FIT);
    else if (event.key === '1') zoomTo(1 / fitted);
    else if (event.key === 'f') fullScreen();
    else if (step && sight.zoom > 1)
      setSight((now) => ({ ...now, x: now.x + (step[0] ?? 0), y: now.y + (step[1] ?? 0) }));
    else return;
    event.preventDefault();
  };
  const fullScreen = () => {
    if (document.fullscreenElement) void document.exitFullscreen();
    else void frame.current?.requestFullscreen?.();
  };
  const percent = Math.round(fitted * sight.zoom * 100);
  return (
    <div
      ref={frame}
      class={`frame viewer${sight.zoom > 1 ? ' zoomed' : ''}`}
      tabIndex={0}
      role="group"
      aria-label="Image. Plus and minus zoom, arrows move, 0 fits, F fills the screen"
      onPointerDown={down}
      onPointerMove={move}
      onPointerUp={up}
      onPointerCancel={up}
      onDblClick={(event) =>
        !(event.target as HTMLElement).closest('button') &&
        zoomTo(sight.zoom > 1 ? 1 : Math.max(2, 1 / fitted), fromMiddle(event))
      }
      onKeyDown={key}
    >
      <img
        ref={image}
        class={small || fitted * sight.zoom > 3 ? 'pixels' : ''}
        src={source}
        alt={name}
        draggable={false}
        onLoad={measure}
        style={{ transform: `translate(${sight.x}px, ${sight.y}px) scale(${sight.zoom})` }}
      />
      <div class="viewer-tools" role="toolbar" aria-label="View">
        {children}
        <button
          type="button"
          aria-label="Zoom out"
          disabled={sight.zoom <= 1}
          onClick={() => zoomTo(sight.zoom / STEP)}
        >
          −
        </button>
        <button
          type="button"
          class="percent"
          aria-label={`${percent} %, ${sight.zoom > 1 ? 'fit into the window' : 'show pixels one to one'}`}
          onClick={() => (sight.zoom > 1 ? setSight(FIT) : zoomTo(Math.max(STEP, 1 / fitted)))}
        >
          {percent} %
        </button>
        <button type="button" aria-label="Zoom in" onClick={() => zoomTo(sight.zoom * STEP)}>
          +
        </button>
        <button type="button" aria-label="Full screen" onClick={fullScreen}>
          <svg viewBox="0 0 16 16" width="14" height="14" aria-hidden="true">
            <path d="M2 6V2h4M10 2h4v4M14 10v4h-4M6 14H2v-4" fill="none" stroke="currentColor" stroke-width="1.6" />
          </svg>
        </button>
      </div>
    </div>
  );
}
