/** Browser code that the panel and the page share. */
declare module '*/elements/prompt.js' {
  export interface PromptHandle {
    area: HTMLTextAreaElement;
    note: HTMLElement;
    /** Close the completion menu; returns whether it was open */
    close(): boolean;
    set(name: string, value: unknown): void;
  }
  export function createPrompt(
    root: HTMLElement,
    options: { onInput(text: string): void; onAdd(kind: string, name: string): void; id?: string },
  ): PromptHandle;
}
