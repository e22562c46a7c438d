/**
 * An endpoint that speaks RunPod's protocol (/run, /status, /stream, /cancel) on loopback. Behind it works the real server, so that the
 * requests, the events and the results are real; only RunPod's queue is played here.
 */
import { createServer, type IncomingMessage } from 'node:http';
import type { AddressInfo } from 'node:net';
import { cancelJob, connect, createJob, OperationError, orThrow, watchJob, type GenerationRequest, type OpResult, type ProgressEvent } from 'ez-diffusion-client';

interface Held {
  status: 'IN_QUEUE' | 'IN_PROGRESS' | 'COMPLETED' | 'CANCELLED';
  waiting: ProgressEvent[];
  output?: OpResult;
  serverJob?: string;
}

export interface EndpointDouble {
  baseUrl: string;
  apiKey: string;
  /** The operations that were asked for, in order */
  paths: () => string[];
  close: () => void;
}

async function bodyOf(request: IncomingMessage): Promise<string> {
  const parts: Buffer[] = [];
  for await (const part of request) parts.push(part as Buffer);
  return Buffer.concat(parts).toString('utf8');
}

export async function startEndpoint(server: string): Promise<EndpointDouble> {
  const client = connect({ baseUrl: server });
  const apiKey = 'key-of-this-test';
  const held = new Map<string, Held>();
  const asked: string[] = [];

  const work = async (job: Held, input: GenerationRequest) => {
    try {
      job.serverJob = (await orThrow(createJob({ client, body: input }))).id;
      if (job.status === 'CANCELLED') await cancelJob({ client, path: { job_id: job.serverJob } });
      for await (const event of watchJob({ client, jobId: job.serverJob })) {
        job.status = job.status === 'CANCELLED' ? 'CANCELLED' : 'IN_PROGRESS';
        if (event.result) job.output = event.result;
        else job.waiting.push(event);
      }
    } catch (error) {
      job.output = error instanceof OperationError ? error.result : { status: 'internal_error', message: String(error) };
    }
    if (job.status !== 'CANCELLED') job.status = 'COMPLETED';
  };

  const answer = async (operation: string, id: string, body: string): Promise<[number, unknown]> => {
    if (operation === 'run') {
      const name = `job-${held.size + 1}`;
      const job: Held = { status: 'IN_QUEUE', waiting: [] };
      held.set(name, job);
      void work(job, (JSON.parse(body) as { input: GenerationRequest }).input);
      return [200, { id: name, status: 'IN_QUEUE' }];
    }
    const job = held.get(id);
    if (!job) return [404, { error: 'job not found' }];
    if (operation === 'stream') return [200, { status: job.status, stream: job.waiting.splice(0).map((output) => ({ output })) }];
    if (operation === 'cancel') {
      job.status = 'CANCELLED';
      if (job.serverJob) await cancelJob({ client, path: { job_id: job.serverJob } });
    }
    return [200, { id, status: job.status, ...(job.output && job.status === 'COMPLETED' ? { output: job.output } : {}) }];
  };

  const listener = createServer(async (request, response) => {
    const [, , operation = '', id = ''] = (request.url ?? '').split('/');
    asked.push(operation);
    const allowed = request.headers.authorization === `Bearer ${apiKey}`;
    const [status, said] = allowed ? await answer(operation, id, await bodyOf(request)) : [401, { error: 'unauthorized' }];
    response.writeHead(status, { 'Content-Type': 'application/json' }).end(JSON.stringify(said));
  });
  await new Promise<void>((resolve) => listener.listen(0, '127.0.0.1', resolve));
  const { port } = listener.address() as AddressInfo;
  return { baseUrl: `http://127.0.0.1:${port}`, apiKey, paths: () => asked, close: () => (listener.closeAllConnections(), void listener.close()) };
}
