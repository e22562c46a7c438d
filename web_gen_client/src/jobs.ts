/** Running generations. Each is a job on the server; running jobs survive a reload. */
import { signal, type Signal } from '@preact/signals';
import {
  cancelJob,
  createJob,
  isLast,
  OperationError,
  orThrow,
  watchJob,
  type OpResult,
  type ProgressEvent,
} from 'ez-diffusion-client';
import { clearErrors, showErrors } from './errors';
import type { JsonObject } from './paths';
import { asBlob, bringBack, newId } from './images';
import { keepItems } from './gallery';
import { client, form, requestOf, seedLocked, status, view, type View } from './state';
import type { GalleryItem } from './storage';

export interface RunningJob {
  key: string;
  id: string | null;
  form: JsonObject;
  /** Whether the job belongs to a grid cell */
  cell: boolean;
  event: Signal<ProgressEvent>;
  preview: Signal<string | null>;
  cancelling: Signal<boolean>;
}

/** Key in sessionStorage, so that tabs do not follow each other's jobs. */
const RUNNING = 'running';
export const jobs = signal<readonly RunningJob[]>([]);

function asUri(image: string, format: string): string {
  return image.startsWith('data:') ? image : `data:image/${format};base64,${image}`;
}

async function keep(result: OpResult, source: JsonObject): Promise<GalleryItem[]> {
  const made = result.generation;
  if (!made) throw new Error('the server sent no images');
  const now = Date.now();
  void navigator.storage?.persist?.(); // prevent eviction when disk space runs low
  const batch = newId();
  const found = made.images.map((image, index): GalleryItem => ({
    id: newId(),
    ...(made.images.length > 1 ? { batch } : {}),
    created: now - index,
    blob: asBlob(asUri(image.image, image.format)),
    width: image.width,
    height: image.height,
    seed: image.seed,
    seconds: made.timings?.total_seconds ?? null,
    plan: { ...made.plan, image_index: index },
    form: source,
  }));
  await keepItems(found);
  return found;
}

function remember(): void {
  sessionStorage.setItem(
    RUNNING,
    JSON.stringify(jobs.value.filter((job) => job.id).map((job) => ({ id: job.id, form: job.form }))),
  );
}

async function follow(job: RunningJob): Promise<GalleryItem[]> {
  for await (const event of watchJob({ client: client.value, jobId: job.id ?? '' })) {
    job.event.value = event;
    if (event.preview) job.preview.value = asUri(event.preview, 'jpeg');
    if (!isLast(event)) continue;
    if (event.result?.status === 'success') return keep(event.result, job.form);
    throw new OperationError(
      event.result ?? {
        status: event.phase === 'cancelled' ? 'cancelled' : 'internal_error',
        message: event.message ?? null,
      },
    );
  }
  throw new Error('the job ended without a result');
}

function newJob(source: JsonObject, cell: boolean, id: string | null = null): RunningJob {
  return {
    key: newId(),
    id,
    form: source,
    cell,
    event: signal({ phase: 'queued' }),
    preview: signal(null),
    cancelling: signal(false),
  };
}

async function through<Result>(job: RunningJob, work: () => Promise<Result>): Promise<Result> {
  jobs.value = [...jobs.value, job];
  try {
    return await work();
  } finally {
    jobs.value = jobs.value.filter((other) => other !== job);
    remember();
  }
}

/** Submit a form and wait for its images; throws an OperationError on failure. */
export function submit(
  source: JsonObject,
  { cell = false, lockSeed = seedLocked.value, onAccepted = () => {} } = {},
): Promise<GalleryItem[]> {
  const job = newJob(source, cell);
  return through(job, async () => {
    const made = await orThrow(createJob({ client: client.value, body: requestOf(source, lockSeed) }));
    job.id = made.id;
    onAccepted();
    remember();
    if (job.cancelling.value) void cancel(job);
    return follow(job);
  });
}

function isCancelled(error: unknown): boolean {
  return error instanceof OperationError && error.result.status === 'cancelled';
}

function reveal(made: readonly GalleryItem[]): void {
  const [first] = made;
  if (!first || view.value.kind !== 'live') return;
  view.value = made.length > 1 ? { kind: 'batch', ids: made.map(({ id }) => id) } : { kind: 'item', id: first.id };
}

/** Show the images of a job when they arrive; on failure, restore the previous view. */
async function show(made: Promise<GalleryItem[]>, before: View = { kind: 'live' }): Promise<void> {
  const began = performance.now();
  try {
    reveal(await made);
    status.value = `Generated in ${((performance.now() - began) / 1000).toFixed(1)} s.`;
  } catch (error) {
    if (view.value.kind === 'live' && !jobs.value.some((job) => !job.cell)) view.value = before;
    status.value = isCancelled(error) ? 'Cancelled.' : 'Generation failed.';
    if (!isCancelled(error)) showErrors(error, true);
  }
}

/** Submit the form; the server queues further requests. The stage changes once the request is accepted. */
export function generate(): Promise<void> {
  clearErrors();
  status.value = '';
  const before = view.value;
  return show(submit(form.value, { onAccepted: () => (view.value = { kind: 'live' }) }), before);
}

export async function cancel(job: RunningJob): Promise<void> {
  job.cancelling.value = true;
  if (job.id) await cancelJob({ client: client.value, path: { job_id: job.id } });
}

export async function cancelAll(): Promise<void> {
  await Promise.all(jobs.value.filter((job) => !job.cancelling.value).map(cancel));
}

/** Resume jobs that were running before a reload, so that their images still reach the gallery. */
export async function findRunning(): Promise<void> {
  const running = JSON.parse(sessionStorage.getItem(RUNNING) ?? '[]') as { id: string; form: JsonObject }[];
  for (const { id, form: source } of running) {
    const job = newJob(await bringBack(source), false, id);
    void through(job, () => show(follow(job)));
  }
}

/** Seconds that a job still takes; `null` where there is no estimate. */
export function secondsLeft(event: ProgressEvent): number | null {
  if (typeof event.seconds_left === 'number') return event.seconds_left;
  if (event.seconds_per_step && event.total_steps && typeof event.step === 'number')
    return (event.total_steps - event.step) * event.seconds_per_step;
  return null;
}
