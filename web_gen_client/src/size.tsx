/** Width and height, with presets of the model's own area and a button that swaps them. */
import { FieldInput } from './fields';
import type { Schema } from './schema';
import { dryRun, edit, model, value } from './state';

const RATIOS: [number, number][] = [
  [1, 1],
  [5, 4],
  [4, 3],
  [3, 2],
  [16, 9],
];

/** The value used for an empty field: an edit takes the size of its first reference image. */
function planned(name: 'width' | 'height'): number | undefined {
  return dryRun.value?.[name] ?? model.value?.[name] ?? undefined;
}

function current(name: 'width' | 'height'): number | undefined {
  const stored = value(name);
  return typeof stored === 'number' ? stored : planned(name);
}

/** A size with the given ratio and roughly the model's training area, rounded to a suitable multiple. */
function sizeOf([across, down]: [number, number], area: number, multiple: number): [number, number] {
  const step = area >= 512 * 512 ? Math.max(64, multiple) : multiple;
  const side = (share: number) => Math.max(step, Math.round(Math.sqrt(area * share) / step) * step);
  return [side(across / down), side(down / across)];
}

export function SizeFields({ known }: { known: Schema }) {
  const field = (name: string) => known.field('GenerationRequest', name);
  const [width, height] = [current('width'), current('height')];
  const portrait = width !== undefined && height !== undefined && height > width;
  const found = model.value;
  const area = (found?.width ?? 512) * (found?.height ?? 512);
  const put = (across: number, down: number) => (edit('width', across), edit('height', down));
  return (
    <div class="size wide" role="group" aria-label="Size">
      <FieldInput field={field('width')} placeholder={planned('width')?.toString()} />
      <button
        type="button"
        class="swap"
        aria-label="Swap width and height"
        title="Swap width and height"
        disabled={width === undefined || height === undefined}
        onClick={() => width !== undefined && height !== undefined && put(height, width)}
      >
        ⇄
      </button>
      <FieldInput field={field('height')} placeholder={planned('height')?.toString()} />
      <div class="ratios">
        {RATIOS.map((ratio) => {
          const [long, short] = sizeOf(ratio, area, found?.size_multiple ?? 8);
          const [across, down] = portrait ? [short, long] : [long, short];
          const name = portrait ? `${ratio[1]}:${ratio[0]}` : `${ratio[0]}:${ratio[1]}`;
          return (
            <button
              type="button"
              key={name}
              aria-pressed={across === width && down === height}
              title={`${across} × ${down}`}
              onClick={() => put(across, down)}
            >
              <span class="shape" style={{ aspectRatio: `${across} / ${down}` }} aria-hidden="true" />
              {name}
            </button>
          );
        })}
      </div>
    </div>
  );
}
