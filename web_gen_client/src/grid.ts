/** One image for each combination of values of up to three parameters; everything else stays, the seed too. */
import { signal } from '@preact/signals';
import { OperationError } from 'ez-diffusion-client';
import { sentence } from './errors';
import { cancel, jobs, submit } from './jobs';
import { isObject, set, type Json, type JsonObject } from './paths';
import { loadImage } from './images';
import { label, typedNumber, type Field } from './schema';
import { applies, form, itemAt, models, schema, seedLocked, status, view } from './state';
import { loadSetting, saveSetting } from './storage';

/** Without a path, an axis that is not used: it has a single value. */
export interface Axis {
  path: string;
  /** Display name of the parameter */
  title: string;
  values: Json[];
  /** Search and replace: the text in the prompt that each value replaces */
  replaces?: string | undefined;
}

export const AXES = ['x', 'y', 'z'] as const;
export type AxisName = (typeof AXES)[number];
export const UNUSED: Axis = { path: '', title: '', values: [null] };
export const REPLACE = 'prompt:replace';

export interface Cell {
  state: 'waiting' | 'running' | 'done' | 'failed';
  itemId?: string;
  error?: string;
}

export interface Grid {
  x: Axis;
  y: Axis;
  z: Axis;
  /** By z, y and x */
  cells: Cell[][][];
}

export interface Parameter {
  path: string;
  title: string;
  field: Field;
}

const AT_ONCE = 2;
const MAX_CELLS = 400;
const SKIPPED = new Set(['request_id', 'num_images', 'preview_interval', 'seeds']);
export const grid = signal<Grid | null>(null);
export const gridRunning = signal(false);

/** Every parameter that can be an axis: the request's own, and those of the LoRAs and controls in the form. */
export function parameters(): Parameter[] {
  const known = schema.value;
  if (!known) return [];
  const flat = (fields: Field[], prefix: string): Parameter[] =>
    fields.flatMap((field) => {
      if (SKIPPED.has(field.path)) return [];
      const title = prefix + label(field.name);
      if (field.kind === 'object') return flat(field.fields, `${title}: `);
      return ['integer', 'number', 'boolean', 'choice', 'text'].includes(field.kind)
        ? [{ path: field.path, title, field }]
        : [];
    });
  const listed = (name: 'loras' | 'controlnets', type: string, word: string) =>
    (Array.isArray(form.value[name]) ? form.value[name] : []).flatMap((_, i) =>
      flat(known.fieldsOf(type, `${name}[${i}]`), `${word} ${i + 1}: `),
    );
  const prompt = known.field('GenerationRequest', 'prompt');
  const replacing = { ...prompt, kind: 'choice' as const, choices: [], path: REPLACE };
  const own = flat(known.fieldsOf('GenerationRequest'), '');
  return [
    ...own.filter(({ path }) => applies(path.split('.')[0] ?? path)),
    { path: REPLACE, title: 'Prompt: search and replace', field: replacing },
    ...listed('loras', 'Lora', 'LoRA'),
    ...listed('controlnets', 'ControlNetUnit', 'Control'),
  ];
}

/** The available values, if the parameter has a list of them. */
export function choicesOf({ path, field }: Parameter): string[] {
  if (path === 'model') return models.value?.models.map((model) => model.name) ?? [];
  return field.kind === 'boolean' ? ['true', 'false'] : field.choices;
}

function range(text: string): number[] {
  const [start = NaN, stop = start, step = 1] = text.split(':').map(Number);
  if (![start, stop, step].every(Number.isFinite) || step <= 0 || stop < start)
    throw new Error(`${text} is not a range: write start:stop:step, such as 10:30:5`);
  return Array.from({ length: Math.floor((stop - start) / step + 1e-9) + 1 }, (_, i) =>
    Number((start + i * step).toFixed(10)),
  );
}

/** Parse axis values: comma-separated numbers or start:stop:step, comma-separated names, or lines of free text. */
export function parseValues(parameter: Parameter, text: string): Json[] {
  const { kind } = parameter.field;
  const free = kind === 'text' && parameter.path !== 'model';
  const parts = text
    .split(free ? '\n' : /[,\n]/)
    .map((part) => part.trim())
    .filter(Boolean);
  if (!parts.length) throw new Error('at least one value is needed');
  if (kind === 'boolean') return parts.map((part) => part === 'true');
  if (kind !== 'integer' && kind !== 'number') return parts;
  return parts.flatMap((part) => {
    if (part.includes(':')) return range(part);
    if (!Number.isFinite(Number(part))) throw new Error(`${part} is not a number`);
    return [typedNumber(part, kind)];
  });
}

/** The form with one parameter set; this enables the section that contains it. */
function withValue(source: JsonObject, { path, replaces }: Axis, value: Json): JsonObject {
  if (!path) return source;
  if (replaces === undefined) return set(source, path, value);
  return { ...source, prompt: String(source['prompt'] ?? '').replaceAll(replaces, String(value)) };
}

/** Parse an axis. In search and replace, the first value is the search text. */
export function axisOf(parameter: Parameter, text: string): Axis {
  const axis = { path: parameter.path, title: parameter.title, values: parseValues(parameter, text) };
  if (parameter.path !== REPLACE) return axis;
  const replaces = String(axis.values[0]);
  if (!String(form.value['prompt'] ?? '').includes(replaces))
    throw new Error(`the prompt does not contain “${replaces}”`);
  if (axis.values.length < 2) throw new Error('write the text to search, a comma, and what replaces it');
  return { ...axis, title: `“${replaces}” in the prompt`, replaces };
}

function change([layer, row, column]: [number, number, number], cell: Cell): void {
  const now = grid.value;
  if (!now) return;
  const cells = now.cells.map((rows, z) =>
    z === layer ? rows.map((old, y) => (y === row ? old.map((known, x) => (x === column ? cell : known)) : old)) : rows,
  );
  grid.value = { ...now, cells };
}

function reasonOf(error: unknown): string {
  if (error instanceof OperationError)
    return (
      error.result.errors?.map((detail) => `${detail.field ?? ''} ${sentence(detail)}`.trim()).join('; ') ||
      error.message
    );
  return error instanceof Error ? error.message : String(error);
}

export async function runGrid({ x, y, z }: Record<AxisName, Axis>): Promise<void> {
  const count = x.values.length * y.values.length * z.values.length;
  if (count > MAX_CELLS) throw new Error(`a grid has at most ${MAX_CELLS} cells, this one would have ${count}`);
  const { seeds: _seeds, num_images: _count, ...rest } = form.value;
  const drawn = crypto.getRandomValues(new Uint32Array(1))[0] ?? 0;
  const base: JsonObject = {
    ...rest,
    num_images: 1,
    preview_interval: 0,
    seed: seedLocked.value ? (form.value['seed'] ?? drawn) : drawn,
  };
  const waiting = z.values.flatMap((_, layer) =>
    y.values.flatMap((_, row) => x.values.map((_, column): [number, number, number] => [layer, row, column])),
  );
  const cells = z.values.map(() => y.values.map(() => x.values.map((): Cell => ({ state: 'waiting' }))));
  grid.value = { x, y, z, cells };
  view.value = { kind: 'grid' };
  gridRunning.value = true;
  const worker = async () => {
    for (let next = waiting.shift(); next && gridRunning.value; next = waiting.shift()) {
      const [layer, row, column] = next;
      change(next, { state: 'running' });
      try {
        const chosen: [Axis, number][] = [
          [x, column],
          [y, row],
          [z, layer],
        ];
        const source = chosen.reduce((form, [axis, at]) => withValue(form, axis, axis.values[at] ?? null), base);
        const [item] = await submit(source, { cell: true, lockSeed: true });
        change(next, item ? { state: 'done', itemId: item.id } : { state: 'failed', error: 'no image returned' });
      } catch (error) {
        change(next, { state: 'failed', error: reasonOf(error) });
      }
    }
  };
  await Promise.all(Array.from({ length: AT_ONCE }, worker));
  status.value = gridRunning.value ? 'The grid is complete.' : 'The grid was stopped.';
  gridRunning.value = false;
  void saveSetting('grid', grid.value);
}

export function stopGrid(): void {
  gridRunning.value = false;
  for (const job of jobs.value) if (job.cell) void cancel(job);
}

/** Migrate a grid of an earlier version, which had two axes labeled with their paths. */
function upgradeGrid(stored: Grid | (Omit<Grid, 'z' | 'cells'> & { cells: Cell[][] })): Grid {
  if ('z' in stored) return stored;
  const titled = (axis: Axis): Axis => ({ ...axis, title: label(axis.path) });
  return { x: titled(stored.x), y: titled(stored.y), z: UNUSED, cells: [stored.cells] };
}

export async function restoreGrid(): Promise<void> {
  const stored = await loadSetting<Grid>('grid');
  grid.value = stored ? upgradeGrid(stored) : null;
}

export function shownValue(value: Json | undefined): string {
  if (typeof value === 'string') return value;
  return isObject(value) || Array.isArray(value) ? JSON.stringify(value) : String(value);
}

/** A value of an axis in words: `Steps 10`. */
export function headingOf(axis: Axis, index: number): string {
  const value = axis.values[index];
  if (!axis.path) return '';
  if (axis.replaces !== undefined) return shownValue(value);
  return value === true || value === false
    ? `${axis.title}: ${value ? 'on' : 'off'}`
    : `${axis.title} ${shownValue(value)}`;
}

/** Render the grid as one image: labeled tables, stacked vertically. */
export async function gridSheet(shown: Grid): Promise<Blob> {
  const { x, y, z, cells } = shown;
  const made = cells.flat(2).map((cell) => (cell.itemId ? itemAt(cell.itemId) : undefined));
  const width = Math.max(64, ...made.map((item) => item?.width ?? 0));
  const height = Math.max(64, ...made.map((item) => item?.height ?? 0));
  const canvas = document.createElement('canvas');
  const [left, top, gap] = [120, 40, 4];
  const tall = top + y.values.length * (height + gap);
  canvas.width = left + x.values.length * (width + gap);
  canvas.height = z.values.length * tall;
  const pen = canvas.getContext('2d');
  if (!pen) throw new Error('the browser has no canvas');
  pen.fillStyle = '#fff';
  pen.fillRect(0, 0, canvas.width, canvas.height);
  pen.fillStyle = '#111';
  pen.font = '13px system-ui, sans-serif';
  pen.textBaseline = 'middle';
  for (const [layer, rows] of cells.entries()) {
    const above = layer * tall;
    pen.fillText(headingOf(z, layer), 6, above + top / 2, left - 12);
    x.values.forEach((_, i) => pen.fillText(headingOf(x, i), left + i * (width + gap) + 4, above + top / 2, width - 8));
    for (const [row, line] of rows.entries()) {
      const down = above + top + row * (height + gap);
      pen.fillText(headingOf(y, row), 6, down + height / 2, left - 12);
      for (const [column, cell] of line.entries()) {
        const item = cell.itemId ? itemAt(cell.itemId) : undefined;
        if (!item) continue;
        const address = URL.createObjectURL(item.blob);
        pen.drawImage(await loadImage(address), left + column * (width + gap), down);
        URL.revokeObjectURL(address);
      }
    }
  }
  return new Promise((resolve, reject) =>
    canvas.toBlob((blob) => (blob ? resolve(blob) : reject(new Error('the browser made no PNG'))), 'image/png'),
  );
}
