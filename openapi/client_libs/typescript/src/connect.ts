import { type Client, createClient, createConfig } from './generated/client/index.js';
import { runpodFetch, type RunpodEndpoint, withoutSlash } from './runpod.js';
import { bearer } from './token.js';

/** Where requests go: to a server, or to a RunPod endpoint. */
export type Connection =
  | {
      /** Of the server, such as http://127.0.0.1:8000 */
      baseUrl: string;
      /** The bearer token, where the server asks for one */
      token?: string | undefined;
      /** In place of the platform's own */
      fetch?: typeof fetch | undefined;
    }
  | {
      runpod: RunpodEndpoint;
      /** In place of the platform's own */
      fetch?: typeof fetch | undefined;
    };

/** A client for the operations of this package; the same calls work on both kinds of connection. A RangeError for a token that no header can carry. */
export function connect(connection: Connection): Client {
  const own = connection.fetch ?? ((request: RequestInfo | URL, init?: RequestInit) => globalThis.fetch(request, init));
  if ('runpod' in connection) {
    // The host is never asked: every request goes through the fetch that speaks RunPod's protocol.
    return createClient(createConfig({ baseUrl: 'http://runpod.invalid', fetch: runpodFetch(connection.runpod, own) }));
  }
  const headers = connection.token ? bearer(connection.token, 'token') : {};
  return createClient(createConfig({ baseUrl: withoutSlash(connection.baseUrl), headers, fetch: own }));
}
