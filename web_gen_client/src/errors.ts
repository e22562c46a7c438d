/** Errors are shown at the field that caused them; those without a visible field appear above the button. */
import { computed, signal } from '@preact/signals';
import { OperationError, type ErrorDetail, type RequestWarning } from 'ez-diffusion-client';

export const errors = signal<readonly ErrorDetail[]>([]);
export const warnings = signal<readonly RequestWarning[]>([]);
const places = signal<ReadonlyMap<string, HTMLElement>>(new Map());

/** Called by each field on mount and unmount. */
export function register(path: string, element: HTMLElement | null): void {
  const known = new Map(places.peek());
  if (element) known.set(path, element);
  else known.delete(path);
  places.value = known;
}

/** The closest field on the page for a path; '' if none. */
function placeOf(path: string | null | undefined, known: ReadonlyMap<string, HTMLElement>): string {
  let place = path ?? '';
  while (place && !known.has(place)) place = place.replace(/(^|\.|\[)[^.[]*$/, '');
  return place;
}

/** Errors of an empty field, shown only once it has lost focus, or after Generate. */
const CAUSED_BY_EMPTY: readonly string[] = ['missing_field', 'too_short', 'empty_prompt'];
const touched = signal<ReadonlySet<string>>(new Set());

/** Called when the focus leaves a field. */
export function touch(path: string): void {
  if (!touched.peek().has(path)) touched.value = new Set(touched.peek()).add(path);
}

/** Reset the touched state: the form was replaced, or a list item was removed. */
export function forgetTouched(below = ''): void {
  touched.value = new Set([...touched.peek()].filter((path) => below !== '' && !path.startsWith(below)));
}

const placed = computed(() => {
  const found = new Map<string, ErrorDetail[]>();
  for (const error of errors.value) {
    const place = placeOf(error.field, places.value);
    if (CAUSED_BY_EMPTY.includes(error.code) && place && !touched.value.has(place)) continue;
    found.set(place, [...(found.get(place) ?? []), error]);
  }
  return found;
});

/** The errors of a field; '' gives those that belong to none. */
export function errorsAt(path: string): readonly ErrorDetail[] {
  return placed.value.get(path) ?? [];
}

/** The number of errors at or below a path. */
export function errorsBelow(path: string): number {
  return [...placed.value]
    .filter(([place]) => place === path || place.startsWith(`${path}.`) || place.startsWith(`${path}[`))
    .reduce((sum, [, list]) => sum + list.length, 0);
}

const SAID_BY_WHAT_IS_ALLOWED: readonly string[] = ['not_a_multiple', 'out_of_range', 'wrong_type', 'not_one_of'];

/** The text of an error at its field: what is wrong (unless the allowed values imply it), and what to do. */
export function sentence(error: ErrorDetail): string {
  const enough = error.allowed && SAID_BY_WHAT_IS_ALLOWED.includes(error.code);
  const parts = [!enough && error.message, error.allowed && `allowed: ${error.allowed}`, error.hint];
  return parts.filter(Boolean).join('; ');
}

export function clearErrors(path?: string): void {
  if (!errors.peek().length) return;
  errors.value =
    path === undefined ? [] : errors.peek().filter((error) => placeOf(error.field, places.peek()) !== path);
}

/** Show the errors; with `reveal`, scroll to the first affected field and focus it. */
export function showErrors(reason: unknown, reveal: boolean): void {
  errors.value = detailsOf(reason);
  if (!reveal) return;
  for (const error of errors.value) touch(placeOf(error.field, places.peek()));
  const place = errors.value.map((error) => placeOf(error.field, places.peek())).find(Boolean);
  const element = place === undefined ? undefined : places.peek().get(place);
  if (!element) return;
  for (let above = element.parentElement; above; above = above.parentElement)
    if (above instanceof HTMLDetailsElement) above.open = true;
  element.scrollIntoView({ block: 'center', behavior: 'instant' });
  element.querySelector<HTMLElement>('input, select, textarea, button')?.focus({ preventScroll: true });
}

function detailsOf(reason: unknown): ErrorDetail[] {
  if (reason instanceof OperationError) {
    const { result } = reason;
    if (result.errors?.length) return result.errors;
    return [{ code: 'internal_error', message: result.message ?? `the server returned the status ${result.status}` }];
  }
  return [{ code: 'internal_error', message: reason instanceof Error ? reason.message : String(reason) }];
}
