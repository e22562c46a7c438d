/** One input per schema field, with its label, description, allowed range and errors. */
import type { ComponentChildren } from 'preact';
import { useEffect, useId, useLayoutEffect, useRef } from 'preact/hooks';
import { errorsAt, errorsBelow, register, sentence, touch } from './errors';
import { get, isObject, type Json, type JsonObject } from './paths';
import { allowed, label, typedNumber, type Field } from './schema';
import { dryRun, edit, value } from './state';

export interface InputProps {
  field: Field;
  title?: string | undefined;
  /** Range of the slider below the number; `true` uses the field's bounds */
  slider?: [number, number] | boolean | undefined;
  /** The value used while the field is empty; defaults to that of the dry run */
  placeholder?: string | undefined;
  choices?: string[] | undefined;
  /** Allow values other than the choices */
  free?: boolean | undefined;
  wide?: boolean | undefined;
}

/** Register an element as the place for the errors of a path while it is mounted. */
export function usePlace(path: string) {
  const place = useRef<HTMLDivElement>(null);
  useLayoutEffect(() => {
    register(path, place.current);
    return () => register(path, null);
  }, [path]);
  return place;
}

export function Errors({ path, id }: { path: string; id?: string }) {
  const found = errorsAt(path);
  return (
    <ul class="errors" id={id} aria-live="polite">
      {found.map((error) => (
        <li key={error.message}>{sentence(error)}</li>
      ))}
    </ul>
  );
}

interface WrapProps {
  path: string;
  title: string;
  description: string;
  wide?: boolean | undefined;
  inline?: boolean | undefined;
  extra?: ComponentChildren;
  children: (attributes: {
    id: string;
    'aria-describedby': string;
    'aria-invalid': boolean;
    'data-path': string;
  }) => ComponentChildren;
}

/** Label, input, description and errors, tied together for screen readers. */
export function Wrap({ path, title, description, wide, inline, extra, children }: WrapProps) {
  const id = useId();
  const place = usePlace(path);
  const wrong = errorsAt(path).length > 0;
  const input = children({
    id,
    'aria-describedby': `${id}-help ${id}-errors`,
    'aria-invalid': wrong,
    'data-path': path,
  });
  return (
    <div
      class={`field${wide ? ' wide' : ''}${wrong ? ' wrong' : ''}${inline ? ' inline' : ''}`}
      ref={place}
      title={description}
      onFocusOut={() => touch(path)}
    >
      {inline && input}
      <div class="label-row">
        <label for={id}>{title}</label>
        {extra}
      </div>
      {!inline && input}
      <span class="unseen" id={`${id}-help`}>
        {description}
      </span>
      <Errors path={path} id={`${id}-errors`} />
    </div>
  );
}

/** What the request would use if a field is empty. */
function planned({ path, initial }: Field): string {
  const plan = dryRun.value as unknown as JsonObject | null;
  if (path === 'num_images' && plan && Array.isArray(plan['seeds'])) return String(plan['seeds'].length);
  const found = plan && get(plan, path);
  if (isObject(found) && typeof found['name'] === 'string') return found['name'];
  if (found !== null && found !== undefined && !isObject(found) && !Array.isArray(found)) return String(found);
  return initial === null || initial === undefined ? '' : String(initial);
}

/** An uncontrolled input that keeps what is being typed: it is rewritten only if its parsed value differs. */
function useShown(text: string, same: (shown: string) => boolean) {
  const input = useRef<HTMLInputElement>(null);
  useEffect(() => {
    if (input.current && !same(input.current.value)) input.current.value = text;
  });
  return input;
}

function sliderOf(field: Field, asked: InputProps['slider']): [number, number] | undefined {
  if (Array.isArray(asked)) return asked;
  if (!asked || field.minimum === undefined || field.maximum === undefined) return undefined;
  return [field.minimum, field.maximum];
}

/** The slider step: the field's own, 0.05 for short ranges, or a power of ten that gives at least fifty steps. */
function sliderStep(field: Field, [low, high]: [number, number]): number {
  if (field.step) return field.step;
  return high - low <= 2 ? 0.05 : 10 ** Math.floor(Math.log10((high - low) / 50));
}

function NumberInput({ field, title, slider, placeholder, wide }: InputProps) {
  const stored = value(field.path);
  const text = typeof stored === 'number' || typeof stored === 'string' ? String(stored) : '';
  const input = useShown(text, (shown) => (shown === '' ? text === '' : typedNumber(shown, field.kind) === stored));
  const hint = placeholder ?? planned(field);
  const range = allowed(field);
  const ends = sliderOf(field, slider);
  const change = (element: HTMLInputElement) =>
    edit(field.path, element.value === '' ? undefined : typedNumber(element.value, field.kind));
  return (
    <Wrap
      path={field.path}
      title={title ?? label(field.name)}
      description={[field.description, range].filter(Boolean).join(' · ')}
      wide={wide}
    >
      {(attributes) => (
        <>
          <input
            {...attributes}
            ref={input}
            type="number"
            inputMode={field.kind === 'integer' ? 'numeric' : 'decimal'}
            step={field.step ?? 'any'}
            min={field.minimum}
            max={field.maximum}
            placeholder={hint}
            onInput={(event) => change(event.currentTarget)}
          />
          {ends && (
            <input
              type="range"
              aria-label={`${title ?? label(field.name)}, slider`}
              min={ends[0]}
              max={ends[1]}
              step={sliderStep(field, ends)}
              value={typeof stored === 'number' ? stored : Number(hint) || ends[0]}
              onInput={(event) => change(event.currentTarget)}
            />
          )}
        </>
      )}
    </Wrap>
  );
}

function TextInput({ field, title, placeholder, wide }: InputProps) {
  const stored = value(field.path);
  return (
    <Wrap path={field.path} title={title ?? label(field.name)} description={field.description} wide={wide}>
      {(attributes) => (
        <input
          {...attributes}
          type="text"
          value={typeof stored === 'string' ? stored : ''}
          placeholder={placeholder ?? planned(field)}
          spellcheck={false}
          onInput={(event) => edit(field.path, event.currentTarget.value || undefined)}
        />
      )}
    </Wrap>
  );
}

/** A text with suggestions: every other value may be typed too. */
function ComboInput({ field, title, choices = [], placeholder, wide }: InputProps) {
  const stored = value(field.path);
  const list = useId();
  return (
    <Wrap path={field.path} title={title ?? label(field.name)} description={field.description} wide={wide}>
      {(attributes) => (
        <>
          <input
            {...attributes}
            type="text"
            list={list}
            value={typeof stored === 'string' ? stored : ''}
            placeholder={placeholder ?? planned(field)}
            spellcheck={false}
            autoComplete="off"
            autocapitalize="off"
            onInput={(event) => edit(field.path, event.currentTarget.value || undefined)}
          />
          <datalist id={list}>
            {choices.map((choice) => (
              <option key={choice} value={choice} />
            ))}
          </datalist>
        </>
      )}
    </Wrap>
  );
}

function ChoiceInput({ field, title, choices, placeholder, wide }: InputProps) {
  const stored = value(field.path);
  const options = choices ?? field.choices;
  const hint = placeholder ?? planned(field);
  const chosen = stored === undefined || stored === null ? '' : String(stored);
  const known = chosen === '' || options.includes(chosen) ? options : [chosen, ...options];
  return (
    <Wrap path={field.path} title={title ?? label(field.name)} description={field.description} wide={wide}>
      {(attributes) => (
        <select
          {...attributes}
          class={chosen ? '' : 'idle'}
          value={chosen}
          onChange={(event) => edit(field.path, event.currentTarget.value || undefined)}
        >
          <option value="">{hint ? `(${hint.replaceAll('_', ' ')})` : '(default)'}</option>
          {known.map((choice) => (
            <option key={choice} value={choice}>
              {choice.replaceAll('_', ' ')}
            </option>
          ))}
        </select>
      )}
    </Wrap>
  );
}

function BooleanInput({ field, title }: InputProps) {
  const stored = value(field.path);
  if (typeof field.initial !== 'boolean') {
    return (
      <Wrap path={field.path} title={title ?? label(field.name)} description={field.description}>
        {(attributes) => (
          <select
            {...attributes}
            class={typeof stored === 'boolean' ? '' : 'idle'}
            value={typeof stored === 'boolean' ? String(stored) : ''}
            onChange={(event) =>
              edit(field.path, event.currentTarget.value === '' ? undefined : event.currentTarget.value === 'true')
            }
          >
            <option value="">(default)</option>
            <option value="true">on</option>
            <option value="false">off</option>
          </select>
        )}
      </Wrap>
    );
  }
  const initial = field.initial;
  return (
    <Wrap path={field.path} title={title ?? label(field.name)} description={field.description} inline>
      {(attributes) => (
        <input
          {...attributes}
          type="checkbox"
          checked={typeof stored === 'boolean' ? stored : initial}
          onChange={(event) =>
            edit(field.path, event.currentTarget.checked === initial ? undefined : event.currentTarget.checked)
          }
        />
      )}
    </Wrap>
  );
}

function readList(text: string): Json[] | undefined {
  const parts = text
    .split(',')
    .map((part) => part.trim())
    .filter(Boolean);
  return parts.length ? parts.map((part) => typedNumber(part, 'integer')) : undefined;
}

function readPairs(text: string): JsonObject | undefined {
  const parts = text
    .split(',')
    .map((part) => part.trim())
    .filter(Boolean);
  if (!parts.length) return undefined;
  return Object.fromEntries(
    parts.map((part): [string, Json] => {
      const [name = '', ...rest] = part.split('=');
      const given = rest.join('=').trim();
      if (given === 'true' || given === 'false') return [name.trim(), given === 'true'];
      return [name.trim(), given !== '' && Number.isFinite(Number(given)) ? Number(given) : given];
    }),
  );
}

function writeList(stored: Json | undefined): string {
  if (Array.isArray(stored)) return stored.map(String).join(', ');
  return isObject(stored)
    ? Object.entries(stored)
        .map(([name, given]) => `${name}=${String(given)}`)
        .join(', ')
    : '';
}

/** Several values in a line: `1, 2, 3`, or `low_threshold=50, high_threshold=120`. */
function ListInput({ field, title, placeholder, wide }: InputProps) {
  const read = field.kind === 'list' ? readList : readPairs;
  const text = writeList(value(field.path));
  const input = useShown(text, (shown) => writeList(read(shown)) === text);
  return (
    <Wrap path={field.path} title={title ?? label(field.name)} description={field.description} wide={wide}>
      {(attributes) => (
        <input
          {...attributes}
          ref={input}
          type="text"
          placeholder={placeholder ?? (field.kind === 'list' ? '1, 2, 3' : 'name=value, …')}
          spellcheck={false}
          onInput={(event) => edit(field.path, read(event.currentTarget.value))}
        />
      )}
    </Wrap>
  );
}

/** An optional object, enabled by a checkbox. */
function ObjectInput({ field }: InputProps) {
  const on = isObject(value(field.path));
  const place = usePlace(field.path);
  const id = useId();
  return (
    <fieldset class="group" title={on ? undefined : field.description}>
      <legend>
        <input
          id={id}
          type="checkbox"
          checked={on}
          onChange={(event) => edit(field.path, event.currentTarget.checked ? {} : undefined)}
          data-path={field.path}
        />
        <label for={id}>{label(field.name)}</label>
      </legend>
      <div ref={place}>
        <Errors path={field.path} />
      </div>
      {on && (
        <div class="fields">
          {field.fields.map((inner) => (
            <FieldInput key={inner.path} field={inner} />
          ))}
        </div>
      )}
    </fieldset>
  );
}

export function FieldInput(props: InputProps) {
  if (props.free) return <ComboInput {...props} />;
  switch (props.choices ? 'choice' : props.field.kind) {
    case 'integer':
    case 'number':
      return <NumberInput {...props} />;
    case 'text':
      return <TextInput {...props} />;
    case 'choice':
      return <ChoiceInput {...props} />;
    case 'boolean':
      return <BooleanInput {...props} />;
    case 'list':
    case 'pairs':
      return <ListInput {...props} />;
    case 'object':
      return <ObjectInput {...props} />;
    default:
      return null;
  }
}

interface SectionProps {
  title: string;
  note?: string | undefined;
  paths: string[];
  open?: boolean | undefined;
  children: ComponentChildren;
}

/** A collapsible section of the form; its summary shows the number of errors inside. */
export function Section({ title, note, paths, open, children }: SectionProps) {
  const wrong = paths.reduce((sum, path) => sum + errorsBelow(path), 0);
  return (
    <details class="section" open={open}>
      <summary>
        <span class="section-title">{title}</span>
        {wrong > 0 && (
          <span class="badge wrong">
            {wrong} {wrong === 1 ? 'error' : 'errors'}
          </span>
        )}
        {note && <span class="note">{note}</span>}
      </summary>
      <div class="section-body">{children}</div>
    </details>
  );
}
