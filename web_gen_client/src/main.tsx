import { render } from 'preact';
import { useEffect, useState } from 'preact/hooks';
import { Form } from './form';
import { followGalleries, Gallery } from './gallery';
import { gridRunning, restoreGrid, stopGrid } from './grid';
import { cancel, findRunning, jobs } from './jobs';
import { blobIn, problemWith } from './image_input';
import { addImage, reference } from './images';
import { useAsReference } from './references';
import { restoreFile } from './restore';
import { keepMeeting, keepPlanning, meetServer } from './server';
import { Stage } from './stage';
import {
  connectionError,
  edit,
  health,
  items,
  maxReferences,
  model,
  restoreSettings,
  schema,
  status,
  theme,
  token,
  undoLast,
  type Theme,
} from './state';
import { loadItems } from './storage';
import '../../diffusion_workers/elements/tokens.css';
import '../../diffusion_workers/elements/prompt.css';
import './style.css';

const THEMES: [Theme, string][] = [
  ['auto', 'Theme: system'],
  ['light', 'Theme: light'],
  ['dark', 'Theme: dark'],
];

function Token() {
  const [typed, setTyped] = useState(token.value);
  return (
    <form class="token" onSubmit={(event) => (event.preventDefault(), (token.value = typed.trim()), void meetServer())}>
      <label>
        Token{' '}
        <input
          type="password"
          autoComplete="off"
          value={typed}
          onInput={(event) => setTyped(event.currentTarget.value)}
        />
      </label>
      <button type="submit">Connect</button>
    </form>
  );
}

/** Open the docs in a new tab, which inherits sessionStorage and finds the token there. */
function openDocs(event: MouseEvent): void {
  if (!token.value) return;
  event.preventDefault();
  sessionStorage.setItem('diffusion-workers-token', token.value);
  open('docs', '_blank');
}

function Header() {
  const now = health.value;
  return (
    <header class="bar">
      <h1>diffusion workers</h1>
      <span class={`server${connectionError.value ? ' lost' : ''}`} role="status">
        {connectionError.value ?? now?.state ?? 'connecting …'}
        {now && !connectionError.value && (
          <span class="keys">{[now.device, `version ${now.version}`].filter(Boolean).map((fact) => ` · ${fact}`)}</span>
        )}
      </span>
      {connectionError.value && /token/.test(connectionError.value) && <Token />}
      <span class="spring" />
      <a href="docs" target="_blank" rel="opener" onClick={openDocs}>
        API
      </a>
      <select
        class="theme"
        aria-label="Theme"
        value={theme.value}
        onChange={(event) => (theme.value = event.currentTarget.value as Theme)}
      >
        {THEMES.map(([name, title]) => (
          <option key={name} value={name}>
            {title}
          </option>
        ))}
      </select>
    </header>
  );
}

/** Handle an image dropped or pasted outside an image field: restore its settings, or use it as an input image. */
async function takeLoose(blob: Blob): Promise<void> {
  try {
    if (await restoreFile(blob)) return;
    if (maxReferences.value > 0 && !model.value?.tasks?.includes('image_to_image')) {
      await useAsReference(blob);
      return;
    }
    edit('image', reference(await addImage(blob)));
    status.value = 'No metadata found; using it as the start image.';
  } catch (error) {
    status.value = error instanceof Error ? error.message : String(error);
  }
}

function cancelFirst(): boolean {
  if (gridRunning.value) stopGrid();
  const job = jobs.value.find((other) => !other.cell && !other.cancelling.value);
  if (job) void cancel(job);
  return job !== undefined || gridRunning.value;
}

function Page() {
  const [over, setOver] = useState(false);
  useEffect(() => {
    const key = (event: KeyboardEvent) => {
      const covered = document.querySelector('dialog[open], :popover-open') ?? document.fullscreenElement;
      if (event.key === 'Escape' && !covered && cancelFirst()) event.preventDefault();
      const typing = (event.target as Element).closest('input, textarea, select, dialog');
      const undo = event.key === 'z' && (event.ctrlKey || event.metaKey) && !event.shiftKey;
      if (undo && !typing && undoLast()) event.preventDefault();
    };
    const paste = (event: ClipboardEvent) => {
      const blob = blobIn(event.clipboardData);
      if (blob && !event.defaultPrevented) void takeLoose(blob);
    };
    addEventListener('keydown', key);
    addEventListener('paste', paste);
    return () => (removeEventListener('keydown', key), removeEventListener('paste', paste));
  }, []);
  const drop = (event: DragEvent) => {
    event.preventDefault();
    setOver(false);
    const blob = blobIn(event.dataTransfer);
    if (blob) void takeLoose(blob);
    else status.value = problemWith(event.dataTransfer);
  };
  return (
    <div
      class={`page${over ? ' over' : ''}`}
      onDrop={drop}
      onDragOver={(event) => (event.preventDefault(), setOver(true))}
      onDragLeave={(event) => event.relatedTarget === null && setOver(false)}
    >
      <Header />
      <main>
        <Form />
        <Stage />
        <Gallery />
      </main>
    </div>
  );
}

async function start(): Promise<void> {
  await restoreSettings();
  items.value = await loadItems();
  await restoreGrid();
  const place = document.getElementById('page');
  if (!place) throw new Error('the page has no #page element');
  render(<Page />, place);
  followGalleries();
  keepMeeting();
  keepPlanning();
  schema.subscribe((known) => known && document.documentElement.setAttribute('data-ready', ''));
  void findRunning();
}

void start();
