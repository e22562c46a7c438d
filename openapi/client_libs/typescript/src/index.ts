/**
 * A typed client for diffusion_workers. `connect` creates it, for a server or a RunPod endpoint, and every operation
 * takes it: `await generate({ client, body: { prompt: 'a red circle' } })`.
 *
 * Types and operations are generated from `openapi/ez_diffusion_api.yaml`.
 */
export * from './generated/index.js';
export type { Client } from './generated/client/index.js';
export { connect, type Connection } from './connect.js';
export { OperationError, orThrow, type Answer } from './errors.js';
export { isLast, runJob, watchJob, type RunOptions, type WatchOptions } from './jobs.js';
export { runpodFetch, type RunpodEndpoint } from './runpod.js';
export { tokenProblem } from './token.js';
