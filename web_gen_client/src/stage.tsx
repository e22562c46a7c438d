/** The middle of the page: the running generation, images of the gallery, a comparison of two, or a grid. */
import { useState } from 'preact/hooks';
import { copyButtons } from './copy_menu';
import { addressOf, comparing, fileName, promptOf, remove, saveFile, select, toggleStar } from './gallery';
import { GridView } from './grid_view';
import { cancel, cancelAll, jobs, secondsLeft, type RunningJob } from './jobs';
import { gridRunning, stopGrid } from './grid';
import { Menu } from './menu';
import { isObject, type Json, type JsonObject } from './paths';
import { addImage, reference } from './images';
import { useAsReference } from './references';
import { formOf } from './restore';
import { pathInWords } from './schema';
import {
  connectionError,
  edit,
  editsOnly,
  form,
  itemAt,
  items,
  maxReferences,
  replaceFormUndoably,
  shownItem,
  status,
  undoable,
  undoLast,
  view,
  type View,
} from './state';
import type { GalleryItem } from './storage';
import { Viewer } from './viewer';

function seconds(value: number): string {
  if (value < 10) return `${value.toFixed(1)} s`;
  return value < 90 ? `${Math.round(value)} s` : `${Math.floor(value / 60)} min ${Math.round(value % 60)} s`;
}

function stateOf(job: RunningJob): string {
  const event = job.event.value;
  if (job.cancelling.value) return 'Stopping …';
  switch (event.phase) {
    case 'queued':
      return event.queue_position ? `Queued, ${event.queue_position} ahead` : 'Queued';
    case 'load':
      return event.message ? `Loading the model: ${event.message}` : 'Loading the model';
    case 'encode':
      return 'Encoding';
    case 'decode':
      return 'Decoding';
    default:
      return `Step ${event.step ?? 0} of ${event.total_steps ?? '?'}`;
  }
}

function Progress({ job }: { job: RunningJob }) {
  const event = job.event.value;
  const left = secondsLeft(event);
  const known = typeof event.step === 'number' && event.total_steps;
  return (
    <div class="progress">
      <progress aria-label="Progress" {...(known ? { value: event.step ?? 0, max: event.total_steps ?? 1 } : {})} />
      <span class="state">{stateOf(job)}</span>
      <span class="note">
        {left !== null && event.phase !== 'queued' ? `${seconds(left)} left` : ''}
        {event.seconds_per_step ? ` · ${event.seconds_per_step.toFixed(2)} s/step` : ''}
      </span>
      <span class="spring" />
      <button type="button" onClick={() => void cancel(job)} disabled={job.cancelling.value}>
        Cancel <kbd>Esc</kbd>
      </button>
    </div>
  );
}

function isSmall(item: GalleryItem): boolean {
  return Math.max(item.width, item.height) <= 192;
}

function Live() {
  const job = jobs.value.find((other) => !other.cell);
  const preview = job?.preview.value;
  if (job)
    return preview ? (
      <div class="frame">
        <img src={preview} alt="Preview of the image" />
      </div>
    ) : (
      <div class="frame empty" aria-busy="true">
        <p>{stateOf(job)}</p>
      </div>
    );
  return (
    <div class="frame empty">
      <div class="welcome">
        <p class="large">
          {editsOnly.value ? 'Add a reference image, describe the change' : 'Describe the image'}
          <span class="keys">
            , and press <kbd>Ctrl</kbd> <kbd>Enter</kbd>
          </span>
          .
        </p>
        <p class="note">
          Drop a generated image anywhere on the page to restore its settings.
          <span class="keys">
            {' '}
            <kbd>Esc</kbd> cancels.
          </span>
        </p>
      </div>
    </div>
  );
}

function download(item: GalleryItem): void {
  saveFile(item.blob, fileName({ prompt: promptOf(item), seed: item.seed, type: item.blob.type }));
}

function Facts({ item }: { item: GalleryItem }) {
  const plan = item.plan;
  const facts: [string, string][] = [
    ['Seed', String(item.seed)],
    ['Size', `${item.width} × ${item.height}`],
    ...(plan
      ? ([
          ['Steps', String(plan.num_inference_steps)],
          ['Guidance', String(plan.guidance_scale)],
          ['Scheduler', plan.scheduler.name ?? plan.scheduler.class_name],
          ['Model', plan.model],
        ] as [string, string][])
      : []),
    ...(item.seconds === null ? [] : [['Time', seconds(item.seconds)] as [string, string]]),
  ];
  return (
    <dl class="facts">
      {facts.map(([name, text]) => (
        <div key={name}>
          <dt>{name}</dt>
          <dd>{text}</dd>
        </div>
      ))}
    </dl>
  );
}

async function asControl(item: GalleryItem): Promise<void> {
  const units = Array.isArray(form.value['controlnets']) ? form.value['controlnets'] : [];
  edit('controlnets', [...units, { image: reference(await addImage(item.blob)) }]);
  status.value = 'Added as a control image.';
}

function Star({ item }: { item: GalleryItem }) {
  return (
    <button
      type="button"
      aria-pressed={item.starred === true}
      aria-label={item.starred ? 'Remove the star' : 'Star this image'}
      onClick={() => void toggleStar(item)}
    >
      {item.starred ? '★' : '☆'}
    </button>
  );
}

function Item({ item }: { item: GalleryItem }) {
  const use = async () => replaceFormUndoably(await formOf(item), true, 'Settings restored.');
  const start = async () => {
    edit('image', reference(await addImage(item.blob)));
    status.value = 'Set as start image.';
  };
  return (
    <>
      <Viewer
        key={item.id}
        source={addressOf(item)}
        name={`${promptOf(item)}, seed ${item.seed}`}
        small={isSmall(item)}
      >
        <Star item={item} />
      </Viewer>
      <div class="actions" role="group" aria-label="This image">
        <button type="button" onClick={() => download(item)}>
          Download
        </button>
        <button type="button" onClick={() => void use()}>
          Reuse settings
        </button>
        <button type="button" onClick={() => void start()}>
          Use as start image
        </button>
        {maxReferences.value > 0 && (
          <button type="button" onClick={() => void useAsReference(item.blob)}>
            Use as reference
          </button>
        )}
        <Menu label="More ▾" name="More for this image">
          <button type="button" onClick={() => edit('seed', item.seed)}>
            Reuse seed
          </button>
          <button type="button" onClick={() => (comparing.value = item.id)}>
            Compare with another
          </button>
          <button type="button" onClick={() => void asControl(item)}>
            Use as a control image
          </button>
          {copyButtons(async () => ({ form: await formOf(item), lockSeed: true }))}
        </Menu>
        <span class="spring" />
        <button type="button" class="danger" onClick={() => void remove(item)}>
          Delete
        </button>
      </div>
      <p class="caption">{promptOf(item)}</p>
      <Facts item={item} />
      {item.plan && (
        <details class="receipt">
          <summary>Receipt</summary>
          <pre tabIndex={0}>{JSON.stringify(item.plan, null, 2)}</pre>
        </details>
      )}
    </>
  );
}

/** All images of one generation. */
function Batch({ ids }: { ids: string[] }) {
  const made = ids.map(itemAt).filter((item) => item !== undefined);
  const columns = Math.ceil(Math.sqrt(made.length));
  return (
    <>
      <ul class="batch" style={{ '--columns': columns }}>
        {made.map((item) => (
          <li key={item.id}>
            <button type="button" aria-label={`Show the image with seed ${item.seed}`} onClick={() => select(item.id)}>
              <img class={isSmall(item) ? 'pixels' : ''} src={addressOf(item)} alt="" draggable={false} />
            </button>
            <span class="note">Seed {item.seed}</span>
          </li>
        ))}
      </ul>
      {made[0] && <p class="caption">{promptOf(made[0])}</p>}
    </>
  );
}

function flat(value: Json | undefined, path = ''): [string, string][] {
  if (isObject(value))
    return Object.entries(value).flatMap(([key, inner]) => flat(inner, path ? `${path}.${key}` : key));
  if (Array.isArray(value)) return value.flatMap((inner, i) => flat(inner, `${path}[${i}]`));
  return value === null || value === undefined ? [] : [[path, String(value)]];
}

/** What differs between two receipts. */
function differences(a: GalleryItem, b: GalleryItem): [string, string, string][] {
  const facts = (item: GalleryItem) =>
    new Map(
      flat((item.plan ?? item.form) as unknown as JsonObject)
        .filter(([path]) => !/^(environment|image_index|warnings|seeds)/.test(path))
        .concat([['seed', String(item.seed)]]),
    );
  const [left, right] = [facts(a), facts(b)];
  return [...new Set([...left.keys(), ...right.keys()])]
    .filter((path) => left.get(path) !== right.get(path))
    .map((path) => [path, left.get(path) ?? '–', right.get(path) ?? '–']);
}

function Compare({ a, b }: { a: GalleryItem; b: GalleryItem }) {
  const [at, setAt] = useState(50);
  const small = Math.max(a.width, b.width) <= 192 ? 'pixels' : '';
  const different = differences(a, b);
  return (
    <>
      <div class="frame compare" style={{ '--at': `${at}%` }}>
        <div class="pair">
          <img class={small} src={addressOf(b)} alt={`Right: seed ${b.seed}`} />
          <img class={`over ${small}`} src={addressOf(a)} alt={`Left: seed ${a.seed}`} />
          <span class="divider" aria-hidden="true" />
          <input
            type="range"
            min="0"
            max="100"
            step="0.5"
            value={at}
            aria-label="How much of the left image is shown"
            onInput={(event) => setAt(Number(event.currentTarget.value))}
          />
        </div>
      </div>
      {different.length === 0 ? (
        <p class="note">Both have the same settings.</p>
      ) : (
        <table class="differences">
          <thead>
            <tr>
              <th scope="col">Setting</th>
              <th scope="col">Left</th>
              <th scope="col">Right</th>
            </tr>
          </thead>
          <tbody>
            {different.map(([path, left, right]) => (
              <tr key={path}>
                <th scope="row">{pathInWords(path)}</th>
                <td>{left}</td>
                <td>{right}</td>
              </tr>
            ))}
          </tbody>
        </table>
      )}
      <div class="actions">
        <button type="button" onClick={() => (view.value = { kind: 'compare', a: b.id, b: a.id })}>
          Swap
        </button>
        <button type="button" onClick={() => (view.value = { kind: 'item', id: a.id })}>
          Only left
        </button>
        <button type="button" onClick={() => (view.value = { kind: 'item', id: b.id })}>
          Only right
        </button>
      </div>
    </>
  );
}

function Shown() {
  const now = view.value;
  if (now.kind === 'grid') return <GridView />;
  if (now.kind === 'compare') {
    const [a, b] = [itemAt(now.a), itemAt(now.b)];
    if (a && b) return <Compare a={a} b={b} />;
  }
  if (now.kind === 'batch' && now.ids.some(itemAt)) return <Batch ids={now.ids} />;
  return shownItem.value ? <Item item={shownItem.value} /> : <Live />;
}

/** The IDs of the batch on the stage, or of the batch that contains the image shown. */
function batchOf(now: View): string[] {
  if (now.kind === 'batch') return now.ids;
  const batch = shownItem.value?.batch;
  const ids = batch ? items.value.filter((item) => item.batch === batch).map((item) => item.id) : [];
  return ids.length > 1 ? ids : [];
}

function Tabs() {
  const now = view.value;
  const running = jobs.value.some((job) => !job.cell);
  const batch = batchOf(now);
  const tabs: [View, string][] = [
    [{ kind: 'live' }, running ? 'Live' : 'Start'],
    [{ kind: 'grid' }, 'X/Y grid'],
    ...(batch.length ? [[{ kind: 'batch', ids: batch }, `Batch of ${batch.length}`] as [View, string]] : []),
  ];
  return (
    <nav class="tabs" aria-label="Stage">
      {tabs.map(([target, name]) => (
        <button
          type="button"
          key={target.kind}
          aria-pressed={now.kind === target.kind}
          onClick={() => (view.value = target)}
        >
          {name}
        </button>
      ))}
      {(now.kind === 'item' || now.kind === 'compare') && (
        <button type="button" aria-pressed="true">
          {now.kind === 'item' ? 'Image' : 'Comparison'}
        </button>
      )}
    </nav>
  );
}

export function Stage() {
  const own = jobs.value.filter((job) => !job.cell);
  const cells = jobs.value.filter((job) => job.cell);
  const stopAll = () => (stopGrid(), void cancelAll());
  return (
    <section class="stage" aria-label="Stage">
      {connectionError.value && (
        <p class="banner" role="alert">
          {connectionError.value}
        </p>
      )}
      <div class="stage-head">
        <Tabs />
        <p class="status" role="status">
          {status.value}
        </p>
        {undoable.value && (
          <button type="button" onClick={undoLast}>
            Undo <kbd>Ctrl Z</kbd>
          </button>
        )}
        {own.length > 1 && (
          <button type="button" onClick={stopAll}>
            Cancel all {own.length}
          </button>
        )}
      </div>
      {[...own, ...(gridRunning.value && view.value.kind !== 'grid' ? cells : [])].map((job) => (
        <Progress key={job.key} job={job} />
      ))}
      <Shown />
    </section>
  );
}
