/** Prompt input with token counts, error marks, completion, and weights by Ctrl+Up and Ctrl+Down. */
import { readPrompt, type ModelInfo, type PromptReport } from 'ez-diffusion-client';
import { useEffect, useLayoutEffect, useRef, useState } from 'preact/hooks';
import { createPrompt, type PromptHandle } from '../../diffusion_workers/elements/prompt.js';
import { Wrap } from './fields';
import { isObject, type Json } from './paths';
import { label, type Schema } from './schema';
import { client, dryRun, edit, editsOnly, form, model, value } from './state';

const READ_DELAY_MS = 300;
type Name = 'prompt' | 'negative_prompt';
type Completion = { kind: string; text: string; note: string };
type Report = PromptReport & { text: string };

/** The names that a model offers to a prompt. */
function completionsOf(info: ModelInfo | null, name: Name): Completion[] {
  const all = (kind: string, names: string[] | null | undefined, note: string) =>
    (names ?? []).map((text) => ({ kind, text, note }));
  const found = [
    ...all('embedding', info?.embeddings, 'embedding'),
    ...all('wildcard', info?.wildcards, 'wildcard'),
  ];
  if (name === 'negative_prompt') return found;
  for (const [lora, words] of Object.entries(info?.trigger_words ?? {}))
    found.push(...all('trigger', words, `trigger word of ${lora}`));
  return [...found, ...all('lora', info?.loras, 'LoRA'), ...all('style', info?.styles, 'style')];
}

function promptPlaceholder(): string {
  return editsOnly.value ? 'Describe the change' : 'Describe the image';
}

/** Add a LoRA or style chosen from the completions to the request. */
function add(kind: string, name: string): void {
  const path = kind === 'lora' ? 'loras' : 'styles';
  const given = value(path);
  const list: Json[] = Array.isArray(given) ? given : [];
  const has = list.some((entry) => (isObject(entry) ? entry['name'] : entry) === name);
  if (!has) edit(path, [...list, kind === 'lora' ? { name, scale: 1 } : name]);
}

/** The chosen model's reading of a text, fetched after a debounce; null until then. */
function useReport(text: string, syntax: unknown): Report | null {
  const [report, setReport] = useState<Report | null>(null);
  const name = form.value['model'];
  useEffect(() => {
    if (!text) return;
    const stop = new AbortController();
    const timer = setTimeout(() => {
      const body = {
        prompt: text,
        ...(typeof name === 'string' ? { model: name } : {}),
        ...(syntax === 'plain' || syntax === 'a1111' ? { prompt_syntax: syntax as 'plain' | 'a1111' } : {}),
      };
      readPrompt({ client: client.value, body, signal: stop.signal }).then(
        ({ data }) => data && !stop.signal.aborted && setReport({ ...data, text }),
        () => undefined, // no count without the server; a lost connection is reported elsewhere
      );
    }, READ_DELAY_MS);
    return () => (clearTimeout(timer), stop.abort());
  }, [text, name, syntax]);
  return report?.text === text ? report : null;
}

interface AreaProps {
  name: Name;
  rows: number;
  attributes: { id: string; 'aria-describedby': string; 'aria-invalid': boolean; 'data-path': string };
}

function PromptArea({ name, rows, attributes }: AreaProps) {
  const place = useRef<HTMLDivElement>(null);
  const editor = useRef<PromptHandle | null>(null);
  const stored = value(name);
  const text = typeof stored === 'string' ? stored : '';
  const syntax = value('prompt_syntax') ?? dryRun.value?.prompt_syntax;
  const report = useReport(text, syntax);
  useLayoutEffect(() => {
    if (!place.current) return;
    const made = createPrompt(place.current, {
      id: attributes.id,
      onInput: (typed) => edit(name, name === 'prompt' ? typed : typed || undefined),
      onAdd: add,
    });
    made.area.addEventListener('keydown', (event) => {
      if (event.key === 'Escape' && made.close()) event.stopPropagation();
    });
    editor.current = made;
    return () => place.current?.replaceChildren();
  }, []);
  useLayoutEffect(() => {
    const made = editor.current;
    if (!made) return;
    made.area.setAttribute('aria-describedby', `${attributes['aria-describedby']} ${made.note.id}`);
    made.area.setAttribute('aria-invalid', String(attributes['aria-invalid']));
    made.area.dataset['path'] = attributes['data-path'];
    made.set('rows', rows);
    made.set('placeholder', name === 'prompt' ? promptPlaceholder() : (dryRun.value?.negative_prompt ?? ''));
    made.set('names', completionsOf(model.value, name));
    made.set('with_syntax', syntax === 'a1111');
    made.set('value', text);
    const { summary = '', borders = [], marks = [] } = report ?? {};
    made.set('annotation', { text, note: summary ?? '', borders, marks });
  });
  return <div ref={place} />;
}

export function Prompt({ name, rows, known }: { name: Name; rows: number; known: Schema }) {
  return (
    <Wrap path={name} title={label(name)} description={known.field('GenerationRequest', name).description} wide>
      {(attributes) => <PromptArea name={name} rows={rows} attributes={attributes} />}
    </Wrap>
  );
}
