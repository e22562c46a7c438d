/** Images in a request. The form holds `image:ID` references, resolved to data only when the request is built. */
import { signal } from '@preact/signals';
import { mapStrings, type Json } from './paths';
import { loadInputImages, saveInputImage } from './storage';

export interface InputImage {
  id: string;
  dataUri: string;
  width: number;
  height: number;
}

const PREFIX = 'image:';
export const inputImages = signal<ReadonlyMap<string, InputImage>>(new Map());

export function newId(): string {
  return [...crypto.getRandomValues(new Uint8Array(9))].map((byte) => byte.toString(36).padStart(2, '0')).join('');
}

export function reference(image: InputImage): string {
  return PREFIX + image.id;
}

export function imageAt(value: Json | undefined): InputImage | undefined {
  return typeof value === 'string' && value.startsWith(PREFIX)
    ? inputImages.value.get(value.slice(PREFIX.length))
    : undefined;
}

export function asDataUri(blob: Blob): Promise<string> {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(String(reader.result));
    reader.onerror = () => reject(reader.error ?? new Error('the file cannot be read'));
    reader.readAsDataURL(blob);
  });
}

export function asBlob(dataUri: string): Blob {
  const [head = '', body = ''] = dataUri.split(',', 2);
  const bytes = Uint8Array.from(atob(body), (letter) => letter.charCodeAt(0));
  return new Blob([bytes], { type: /^data:([^;]+)/.exec(head)?.[1] ?? 'application/octet-stream' });
}

export async function loadImage(source: string): Promise<HTMLImageElement> {
  const image = new Image();
  image.src = source;
  await image.decode();
  return image;
}

export async function addImage(source: Blob | string): Promise<InputImage> {
  const dataUri = typeof source === 'string' ? source : await asDataUri(source);
  const decoded = await loadImage(dataUri).catch(() => {
    throw new Error('this is not an image that the browser can read');
  });
  const image = { id: newId(), dataUri, width: decoded.naturalWidth, height: decoded.naturalHeight };
  inputImages.value = new Map(inputImages.value).set(image.id, image);
  await saveInputImage(image);
  return image;
}

/** Load the images of a stored form from the disk. */
export async function bringBack<Value extends Json>(form: Value): Promise<Value> {
  const ids: string[] = [];
  mapStrings(form, (text) => (text.startsWith(PREFIX) && ids.push(text.slice(PREFIX.length)), text));
  const missing = ids.filter((id) => !inputImages.value.has(id));
  const found = await loadInputImages(missing);
  if (found.length)
    inputImages.value = new Map([...inputImages.value, ...found.map((image) => [image.id, image] as const)]);
  return form;
}

/** The form with its image references replaced by data URIs. */
export function withData<Value extends Json>(form: Value): Value {
  return mapStrings(form, (text) => imageAt(text)?.dataUri ?? text) as Value;
}

export function idsIn(form: Json): Set<string> {
  const ids = new Set<string>();
  mapStrings(form, (text) => (text.startsWith(PREFIX) && ids.add(text.slice(PREFIX.length)), text));
  return ids;
}
