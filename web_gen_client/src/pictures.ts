/** Pictures that go into a request. The form holds `picture:ID` in their place, and the data travel once, when a request is sent. */
import { signal } from '@preact/signals';
import { mapStrings, type Json } from './paths';
import { loadPictures, savePicture } from './storage';

export interface Picture {
  id: string;
  dataUri: string;
  width: number;
  height: number;
}

const PREFIX = 'picture:';
export const pictures = signal<ReadonlyMap<string, Picture>>(new Map());

export function newId(): string {
  return [...crypto.getRandomValues(new Uint8Array(9))].map((byte) => byte.toString(36).padStart(2, '0')).join('');
}

export function reference(picture: Picture): string {
  return PREFIX + picture.id;
}

export function pictureAt(value: Json | undefined): Picture | undefined {
  return typeof value === 'string' && value.startsWith(PREFIX) ? pictures.value.get(value.slice(PREFIX.length)) : undefined;
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

export async function addPicture(source: Blob | string): Promise<Picture> {
  const dataUri = typeof source === 'string' ? source : await asDataUri(source);
  const image = await loadImage(dataUri).catch(() => {
    throw new Error('this is not a picture that the browser can read');
  });
  const picture = { id: newId(), dataUri, width: image.naturalWidth, height: image.naturalHeight };
  pictures.value = new Map(pictures.value).set(picture.id, picture);
  await savePicture(picture);
  return picture;
}

/** The pictures that a stored form needs, back from the disk; what is not there any more is left out of the form. */
export async function bringBack<Value extends Json>(form: Value): Promise<Value> {
  const ids: string[] = [];
  mapStrings(form, (text) => (text.startsWith(PREFIX) && ids.push(text.slice(PREFIX.length)), text));
  const missing = ids.filter((id) => !pictures.value.has(id));
  const found = await loadPictures(missing);
  if (found.length) pictures.value = new Map([...pictures.value, ...found.map((picture) => [picture.id, picture] as const)]);
  return form;
}

/** A form with the data of its pictures in place of their names. */
export function withData<Value extends Json>(form: Value): Value {
  return mapStrings(form, (text) => pictureAt(text)?.dataUri ?? text) as Value;
}

export function idsIn(form: Json): Set<string> {
  const ids = new Set<string>();
  mapStrings(form, (text) => (text.startsWith(PREFIX) && ids.add(text.slice(PREFIX.length)), text));
  return ids;
}
