import type { ErrorDetail, OpResult } from './generated/index.js';

/** What an operation of this package resolves to. */
export type Answer<Data> = { data?: Data | undefined; error?: unknown; request?: Request | undefined; response?: Response | undefined };

/** An operation that did not succeed; `result` says why, field by field. */
export class OperationError extends Error {
  override readonly name: string = 'OperationError';
  readonly result: OpResult;
  /** The HTTP status, absent when no answer came */
  readonly httpStatus: number | undefined;

  constructor(result: OpResult, httpStatus?: number, options?: ErrorOptions) {
    super(result.errors?.map(errorLine).join('; ') || result.message || result.status, options);
    this.result = result;
    this.httpStatus = httpStatus;
  }
}

/** An operation aborted by its own signal, named like the DOMException: AbortError, or TimeoutError for AbortSignal.timeout(). */
class AbortedError extends OperationError {
  override readonly name: string;

  constructor(result: OpResult, reason: unknown) {
    super(result, undefined, { cause: reason });
    this.name = nameOf(reason) === 'TimeoutError' ? 'TimeoutError' : 'AbortError';
  }
}

function nameOf(reason: unknown): string | undefined {
  return typeof reason === 'object' && reason !== null && 'name' in reason ? String(reason.name) : undefined;
}

/** The error of an operation that a signal ended. */
export function aborted(reason: unknown, result?: OpResult): OperationError {
  return new AbortedError(result ?? { status: 'cancelled', message: 'the operation was aborted' }, reason);
}

/** Whether a retry may succeed: no response, or one from a gateway or an overloaded server. */
export function isTransient(answer: Answer<unknown>): boolean {
  if (wasAborted(answer)) return false;
  if (!answer.response) return answer.error !== undefined;
  return [408, 429, 500, 502, 503, 504].includes(answer.response.status) && !isOpResult(answer.error);
}

function wasAborted(answer: Answer<unknown>): boolean {
  return answer.request?.signal.aborted === true || ['AbortError', 'TimeoutError'].includes(nameOf(answer.error) ?? '');
}

function errorLine(error: ErrorDetail): string {
  return error.field ? `${error.field}: ${error.message}` : error.message;
}

/** Wrap a missing response, or one without an OpResult, in an OpResult. */
function strangeResult(answer: Answer<unknown>): OpResult {
  const message = answer.response ? `the server answered ${answer.response.status} and no OpResult` : unreachable(answer.error);
  return { status: 'internal_error', message, errors: [{ code: 'internal_error', message, retryable: !answer.response }] };
}

/** Messages of fetch for a failed connection, by browser and Node; none of them gives a reason. */
const NO_CONNECTION = ['Failed to fetch', 'Load failed', 'fetch failed', 'network error'];

function unreachable(error: unknown): string {
  const said = error instanceof Error ? error.message : String(error);
  const bare = NO_CONNECTION.includes(said) || said.startsWith('NetworkError when attempting to fetch');
  return `the server cannot be reached: ${bare ? 'check that it is running, and its address' : said}`;
}

export function isOpResult(value: unknown): value is OpResult {
  return typeof value === 'object' && value !== null && typeof (value as OpResult).status === 'string' && !('phase' in value);
}

/**
 * The data of a response. Throws an OperationError if there is none, or if it is an OpResult that reports a failure; the error is
 * named AbortError or TimeoutError if the call's own signal aborted it.
 */
export async function orThrow<Data>(asked: Answer<Data> | Promise<Answer<Data>>): Promise<NonNullable<Data>> {
  const answer = await asked;
  const failed = isOpResult(answer.error) ? answer.error : isOpResult(answer.data) && answer.data.status !== 'success' ? answer.data : undefined;
  if (failed) throw new OperationError(failed, answer.response?.status);
  if (answer.data === undefined && wasAborted(answer)) throw aborted(answer.request?.signal.reason ?? answer.error);
  if (answer.data === undefined || answer.data === null) {
    throw new OperationError(strangeResult(answer), answer.response?.status, { cause: answer.error });
  }
  return answer.data;
}
