/** Tabs of this page tell each other what changed in the storage that they share. */
export type Message = { kind: 'gallery' } | { kind: 'setting'; key: string };

const channel = 'BroadcastChannel' in globalThis ? new BroadcastChannel('diffusion-workers') : null;

export function tell(message: Message): void {
  channel?.postMessage(message);
}

export function onMessage(handle: (message: Message) => void): void {
  channel?.addEventListener('message', (event: MessageEvent<Message>) => handle(event.data));
}
