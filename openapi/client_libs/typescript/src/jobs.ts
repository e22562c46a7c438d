import type { Client } from './generated/client/index.js';
import { cancelJob, createJob, getJob, streamJobEvents, type GenerationRequest, type Job, type OpResult, type ProgressEvent } from './generated/index.js';
import { OperationError, orThrow } from './errors.js';

export interface WatchOptions {
  client: Client;
  jobId: string;
  /** Stops the watching; the job goes on */
  signal?: AbortSignal | undefined;
  /** How often a connection that broke is made again before the job is asked for its state, 4 by default */
  retries?: number;
}

const LAST_PHASES: readonly string[] = ['done', 'failed', 'cancelled'];
const FIRST_RETRY_MS = 250;

/** Whether no event comes after this one. */
export function isLast(event: ProgressEvent): boolean {
  return LAST_PHASES.includes(event.phase);
}

function pause(milliseconds: number, signal: AbortSignal): Promise<void> {
  return new Promise((resolve) => {
    if (signal.aborted) return resolve();
    const timer = setTimeout(resolve, milliseconds);
    signal.addEventListener('abort', () => (clearTimeout(timer), resolve()), { once: true });
  });
}

function eventOfJob(job: Job): ProgressEvent {
  const phases = { queued: 'queued', running: 'denoise', succeeded: 'done', failed: 'failed', cancelled: 'cancelled' } as const;
  const phase = phases[job.state];
  return { ...(LAST_PHASES.includes(phase) ? {} : job.progress), phase, job_id: job.id, result: job.result ?? null, message: job.result?.message ?? null };
}

/**
 * The events of a job, to the last one, which carries the result. A connection that breaks is made again; where that does not
 * help, the job itself is asked. Leaving the loop closes the connection and leaves the job alone.
 */
export async function* watchJob({ client, jobId, signal, retries = 4 }: WatchOptions): AsyncGenerator<ProgressEvent, void, undefined> {
  const path = { job_id: jobId };
  const closing = new AbortController();
  const close = () => closing.abort();
  signal?.addEventListener('abort', close);
  if (signal?.aborted) close();
  const refused = (error: unknown) => {
    if (error instanceof Error && /^SSE failed: 4/.test(error.message)) close();
  };
  try {
    const reconnecting = {
      onSseError: refused, sseMaxRetryAttempts: retries + 1, sseDefaultRetryDelay: FIRST_RETRY_MS,
      sseSleepFn: (milliseconds: number) => pause(milliseconds, closing.signal),
    };
    const { stream } = await streamJobEvents({ client, path, signal: closing.signal, ...reconnecting });
    for await (const event of stream) {
      yield event;
      if (isLast(event)) return;
    }
    while (!signal?.aborted) {
      const event = eventOfJob(await orThrow(getJob({ client, path, ...(signal ? { signal } : {}) })));
      yield event;
      if (isLast(event)) return;
      await pause(1000, signal ?? closing.signal);
    }
  } finally {
    signal?.removeEventListener('abort', close);
    close();
  }
}

export interface RunOptions {
  client: Client;
  body: GenerationRequest;
  onProgress?: ((event: ProgressEvent) => void) | undefined;
  /** Cancels the job */
  signal?: AbortSignal | undefined;
}

/** Queue a request, report its progress, and wait for its result; an OperationError where it does not succeed. */
export async function runJob({ client, body, onProgress, signal }: RunOptions): Promise<OpResult> {
  const job = await orThrow(createJob({ client, body }));
  const cancel = () => void cancelJob({ client, path: { job_id: job.id } });
  signal?.addEventListener('abort', cancel);
  if (signal?.aborted) cancel();
  try {
    for await (const event of watchJob({ client, jobId: job.id })) {
      onProgress?.(event);
      if (!isLast(event)) continue;
      if (event.result?.status === 'success') return event.result;
      throw new OperationError(event.result ?? { status: event.phase === 'cancelled' ? 'cancelled' : 'internal_error', message: event.message ?? null });
    }
    throw new OperationError({ status: 'internal_error', message: 'the job ended without a result' });
  } finally {
    signal?.removeEventListener('abort', cancel);
  }
}
