/** One image for each pair of values of two parameters; everything else stays, the seed too. */
import { signal } from '@preact/signals';
import { OperationError } from 'ez-diffusion-client';
import { sentence } from './errors';
import { cancel, jobs, submit } from './jobs';
import { isObject, set, type Json, type JsonObject } from './paths';
import { loadImage } from './images';
import { label, typedNumber, type Field } from './schema';
import { form, itemAt, models, schema, seedLocked, status, view } from './state';
import { loadSetting, saveSetting } from './storage';

export interface Axis {
  path: string;
  values: Json[];
}

export interface Cell {
  state: 'waiting' | 'running' | 'done' | 'failed';
  itemId?: string;
  error?: string;
}

export interface Grid {
  x: Axis;
  y: Axis;
  cells: Cell[][];
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
  return [
    ...flat(known.fieldsOf('GenerationRequest'), ''),
    ...listed('loras', 'Lora', 'LoRA'),
    ...listed('controlnets', 'ControlNetUnit', 'Control'),
  ];
}

/** The values that can be chosen from, where there is a list of them. */
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

/** The values in a text: numbers with commas or as start:stop:step, names with commas, free text by lines. */
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

/** A form with the value of one parameter; where that is a part of something that is off, it is on then. */
function withValue(source: JsonObject, { path }: Axis, value: Json): JsonObject {
  return set(source, path, value);
}

function change(row: number, column: number, cell: Cell): void {
  const now = grid.value;
  if (!now) return;
  grid.value = {
    ...now,
    cells: now.cells.map((cells, y) => (y === row ? cells.map((old, x) => (x === column ? cell : old)) : cells)),
  };
}

function reasonOf(error: unknown): string {
  if (error instanceof OperationError)
    return (
      error.result.errors?.map((detail) => `${detail.field ?? ''} ${sentence(detail)}`.trim()).join('; ') ||
      error.message
    );
  return error instanceof Error ? error.message : String(error);
}

export async function runGrid(x: Axis, y: Axis): Promise<void> {
  if (x.values.length * y.values.length > MAX_CELLS)
    throw new Error(`a grid has at most ${MAX_CELLS} cells, this one would have ${x.values.length * y.values.length}`);
  const { seeds: _seeds, num_images: _count, ...rest } = form.value;
  const drawn = crypto.getRandomValues(new Uint32Array(1))[0] ?? 0;
  const base: JsonObject = {
    ...rest,
    num_images: 1,
    preview_interval: 0,
    seed: seedLocked.value ? (form.value['seed'] ?? drawn) : drawn,
  };
  const waiting = y.values.flatMap((_, row) => x.values.map((_, column) => ({ row, column })));
  grid.value = { x, y, cells: y.values.map(() => x.values.map(() => ({ state: 'waiting' }))) };
  view.value = { kind: 'grid' };
  gridRunning.value = true;
  const worker = async () => {
    for (let next = waiting.shift(); next && gridRunning.value; next = waiting.shift()) {
      const { row, column } = next;
      change(row, column, { state: 'running' });
      try {
        const source = withValue(withValue(base, x, x.values[column] ?? null), y, y.values[row] ?? null);
        const [item] = await submit(source, { cell: true, lockSeed: true });
        change(row, column, item ? { state: 'done', itemId: item.id } : { state: 'failed', error: 'no image came' });
      } catch (error) {
        change(row, column, { state: 'failed', error: reasonOf(error) });
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

export async function restoreGrid(): Promise<void> {
  grid.value = (await loadSetting<Grid>('grid')) ?? null;
}

export function shownValue(value: Json | undefined): string {
  if (typeof value === 'string') return value;
  return isObject(value) || Array.isArray(value) ? JSON.stringify(value) : String(value);
}

/** The grid as one image, with its values at the edges. */
export async function gridSheet({ x, y, cells }: Grid): Promise<Blob> {
  const made = cells.flat().map((cell) => (cell.itemId ? itemAt(cell.itemId) : undefined));
  const [width, height] = [
    Math.max(64, ...made.map((item) => item?.width ?? 0)),
    Math.max(64, ...made.map((item) => item?.height ?? 0)),
  ];
  const canvas = document.createElement('canvas');
  const [left, top, gap] = [120, 40, 4];
  canvas.width = left + x.values.length * (width + gap);
  canvas.height = top + y.values.length * (height + gap);
  const pen = canvas.getContext('2d');
  if (!pen) throw new Error('the browser has no canvas');
  pen.fillStyle = '#fff';
  pen.fillRect(0, 0, canvas.width, canvas.height);
  pen.fillStyle = '#111';
  pen.font = '13px system-ui, sans-serif';
  pen.textBaseline = 'middle';
  pen.fillText(`${y.path} \\ ${x.path}`, 6, top / 2, left - 12);
  x.values.forEach((value, i) => pen.fillText(shownValue(value), left + i * (width + gap) + 4, top / 2, width - 8));
  y.values.forEach((value, i) => pen.fillText(shownValue(value), 6, top + i * (height + gap) + height / 2, left - 12));
  for (const [index, item] of made.entries()) {
    if (!item) continue;
    const address = URL.createObjectURL(item.blob);
    pen.drawImage(
      await loadImage(address),
      left + (index % x.values.length) * (width + gap),
      top + Math.floor(index / x.values.length) * (height + gap),
    );
    URL.revokeObjectURL(address);
  }
  return new Promise((resolve, reject) =>
    canvas.toBlob((blob) => (blob ? resolve(blob) : reject(new Error('the browser made no PNG'))), 'image/png'),
  );
}
