/** Requests other than generations: server info, dry runs and control maps. */
import { effect } from '@preact/signals';
import {
  health as askHealth,
  listModels,
  OperationError,
  orThrow,
  plan,
  preprocess,
  type ControlMap,
  type Health,
  type PreprocessRequest,
  tokenProblem,
} from 'ez-diffusion-client';
import { clearErrors, showErrors, warnings } from './errors';
import type { Json } from './paths';
import { Schema } from './schema';
import {
  client,
  connectionError,
  dryRun,
  form,
  health,
  models,
  onUnreachable,
  request,
  schema,
  serverUrl,
  token,
} from './state';

const DRY_RUN_DELAY_MS = 500;
const LOOK_AGAIN_MS = 2_000;
const READ_AGAIN_MS = 15_000;
const PATIENCE_MS = 10_000;
export const LOST = 'Server not responding. Retrying …';

function notAllowed(): Error {
  return new Error(token.value ? 'Invalid token.' : 'The server requires a token.');
}

async function askSchema(): Promise<Schema> {
  const headers: HeadersInit = token.value ? { Authorization: `Bearer ${token.value}` } : {};
  const response = await fetch(`${serverUrl}/openapi.json`, { headers });
  if (response.status === 401) throw notAllowed();
  if (!response.ok) throw new Error(`the server answered ${response.status} to openapi.json`);
  return new Schema((await response.json()) as Json);
}

/** Read what the server offers. */
export async function meetServer(): Promise<void> {
  const problem = tokenProblem(token.value);
  if (problem !== undefined) {
    connectionError.value = `The token: ${problem}.`;
    return;
  }
  try {
    const [found, offered] = await Promise.all([
      schema.value ?? askSchema(),
      orThrow(listModels({ client: client.value })),
    ]);
    schema.value = found;
    const changed = JSON.stringify(offered) !== JSON.stringify(models.value);
    if (changed) models.value = offered; // and everything that depends on it is requested again
    health.value = await orThrow(askHealth({ client: client.value }));
    connectionError.value = null;
  } catch (error) {
    if (error instanceof TypeError || (error instanceof OperationError && error.httpStatus === undefined)) {
      connectionError.value = LOST; // no answer at all
      return;
    }
    const shown = error instanceof OperationError && error.httpStatus === 401 ? notAllowed() : error;
    connectionError.value = shown instanceof Error ? shown.message : String(shown);
  }
}

let looking = false;

/** Health check; reloads everything only after a lost connection. */
async function look(): Promise<void> {
  if (looking) return;
  looking = true;
  try {
    const answer = await fetch(`${serverUrl}/health`, { signal: AbortSignal.timeout(PATIENCE_MS) });
    if (answer.ok) health.value = (await answer.json()) as Health;
    if (connectionError.value === LOST) await meetServer();
  } catch (error) {
    const slow = error instanceof DOMException && error.name === 'TimeoutError';
    if (!slow) connectionError.value = LOST;
  }
  looking = false;
}

/** Poll the server to show a lost connection promptly and to recover once it is back. */
export function keepMeeting(): void {
  onUnreachable.call = () => void look();
  void meetServer();
  const visible = () => document.visibilityState === 'visible';
  setInterval(() => visible() && void look(), LOOK_AGAIN_MS);
  setInterval(() => visible() && connectionError.value !== LOST && void meetServer(), READ_AGAIN_MS);
  document.addEventListener('visibilitychange', () => visible() && void look());
}

/** Dry-run the request after each edit, debounced; a new edit aborts the pending call. */
export function keepPlanning(): void {
  let timer: ReturnType<typeof setTimeout> | undefined;
  let asking: AbortController | undefined;
  effect(() => {
    const body = request.value;
    const ready = models.value !== null && String(form.value['prompt'] ?? '').trim() !== '';
    clearTimeout(timer);
    asking?.abort();
    if (!ready) {
      dryRun.value = null;
      return;
    }
    timer = setTimeout(async () => {
      asking = new AbortController();
      const { signal } = asking;
      try {
        const result = await orThrow(plan({ client: client.value, body, signal }));
        dryRun.value = result.plan ?? null;
        warnings.value = result.warnings ?? [];
        clearErrors();
      } catch (error) {
        if (signal.aborted) return;
        dryRun.value = null;
        warnings.value = [];
        if (error instanceof OperationError && error.httpStatus !== undefined) showErrors(error, false);
      }
    }, DRY_RUN_DELAY_MS);
  });
}

export async function controlMap(body: PreprocessRequest, signal: AbortSignal): Promise<ControlMap> {
  const result = await orThrow(preprocess({ client: client.value, body, signal }));
  if (!result.control_map) throw new Error('the server sent no map');
  return result.control_map;
}
