import { type Client, createClient, createConfig } from './generated/client/index.js';
import { runpodFetch, type RunpodEndpoint, withoutSlash } from './runpod.js';
import { bearer } from './token.js';

/** Where requests go: to a server, or to a RunPod endpoint. */
export type Connection =
  | {
      /** Base URL of the server, such as http://127.0.0.1:8000 */
      baseUrl: string;
      /** Bearer token, if the server requires one */
      token?: string | undefined;
      /** Replaces the global fetch */
      fetch?: typeof fetch | undefined;
    }
  | {
      runpod: RunpodEndpoint;
      /** Replaces the global fetch */
      fetch?: typeof fetch | undefined;
    };

/** A client for the operations of this package, with the same calls for both kinds of connection. Throws a RangeError for an invalid token. */
export function connect(connection: Connection): Client {
  const own = connection.fetch ?? ((request: RequestInfo | URL, init?: RequestInit) => globalThis.fetch(request, init));
  if ('runpod' in connection) {
    // The host is never contacted: every request goes through the fetch that speaks RunPod's protocol.
    return createClient(createConfig({ baseUrl: 'http://runpod.invalid', fetch: runpodFetch(connection.runpod, own) }));
  }
  const headers = connection.token ? bearer(connection.token, 'token') : {};
  return createClient(createConfig({ baseUrl: withoutSlash(connection.baseUrl), headers, fetch: own }));
}
