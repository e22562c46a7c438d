/** What an image file says about how it was made: the plan of its generation, and the line of parameters that other programs write. */
import type { GenerationPlan } from 'ez-diffusion-client';
import { isObject } from './paths';
import { upgradePlan } from './upgrade';

export interface Metadata {
  plan: GenerationPlan | null;
  parameters: string | null;
}

const PLAN_KEY = 'diffusion_workers';
const PARAMETERS_KEY = 'parameters';
const PNG_SIGNATURE = [0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a];

const latin = (bytes: Uint8Array) => new TextDecoder('latin1').decode(bytes);
const utf8 = (bytes: Uint8Array) => new TextDecoder().decode(bytes);

async function inflate(bytes: Uint8Array): Promise<Uint8Array> {
  const stream = new Blob([new Uint8Array(bytes)]).stream().pipeThrough(new DecompressionStream('deflate'));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

/** The bytes before the first zero, and those behind it. */
function split(bytes: Uint8Array): [Uint8Array, Uint8Array] {
  const zero = bytes.indexOf(0);
  return zero < 0 ? [bytes, new Uint8Array()] : [bytes.subarray(0, zero), bytes.subarray(zero + 1)];
}

async function textOf(type: string, body: Uint8Array): Promise<[string, string] | null> {
  const [key, rest] = split(body);
  if (type === 'tEXt') return [latin(key), latin(rest)];
  if (type === 'zTXt') return [latin(key), latin(await inflate(rest.subarray(1)))];
  if (type !== 'iTXt') return null;
  const packed = rest[0] === 1;
  const [, afterLanguage] = split(rest.subarray(2));
  const [, text] = split(afterLanguage);
  return [latin(key), utf8(packed ? await inflate(text) : text)];
}

/** The texts of a PNG by their keys; damaged chunks are passed over. */
export async function pngTexts(file: Uint8Array): Promise<Map<string, string>> {
  const texts = new Map<string, string>();
  const view = new DataView(file.buffer, file.byteOffset, file.byteLength);
  let at = PNG_SIGNATURE.length;
  while (at + 12 <= file.length) {
    const length = view.getUint32(at);
    const type = latin(file.subarray(at + 4, at + 8));
    if (at + 12 + length > file.length || type === 'IEND') break;
    const found = await textOf(type, file.subarray(at + 8, at + 8 + length)).catch(() => null);
    if (found) texts.set(...found);
    at += 12 + length;
  }
  return texts;
}

function parseJson(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}

/** The plan in a text, in the schema of today; throws where it is of a newer version. */
function parsePlan(text: string | undefined): GenerationPlan | null {
  const plan = parseJson(text ?? '');
  return isObject(plan) && typeof plan['plan_version'] === 'number' && typeof plan['prompt'] === 'string' ? upgradePlan(plan) : null;
}

/** A plan in the EXIF data of a JPEG or WebP: it is written in ASCII and begins like this. */
function planInside(file: Uint8Array): GenerationPlan | null {
  const text = latin(file.subarray(0, 200_000)) + latin(file.subarray(Math.max(200_000, file.length - 200_000)));
  const start = text.indexOf('{"plan_version"');
  const end = start < 0 ? -1 : text.indexOf('\0', start);
  return start < 0 ? null : parsePlan(text.slice(start, end < 0 ? undefined : end));
}

export async function readMetadata(blob: Blob): Promise<Metadata> {
  const file = new Uint8Array(await blob.arrayBuffer());
  if (!PNG_SIGNATURE.every((byte, index) => file[index] === byte)) return { plan: planInside(file), parameters: null };
  const texts = await pngTexts(file);
  return { plan: parsePlan(texts.get(PLAN_KEY)), parameters: texts.get(PARAMETERS_KEY) ?? null };
}

/** The settings in a line of parameters: prompt, negative prompt, and each setting under its name. */
export function parseParameters(line: string): Map<string, string> {
  const cut = line.lastIndexOf('\n');
  const last = line.slice(cut + 1);
  const settings = last.startsWith('Steps:');
  const body = `\n${settings ? line.slice(0, Math.max(cut, 0)) : line}`;
  const [prompt = '', ...negative] = body.split('\nNegative prompt:');
  const parts = new Map([['Prompt', prompt.slice(1)]]);
  if (negative.length) parts.set('Negative prompt', negative.join('\nNegative prompt:').replace(/^ /, ''));
  if (settings) for (const [key, value] of settingPairs(last)) parts.set(key, value.trim());
  return parts;
}

/** The "Key: value" parts of a line, in linear time: each attempt begins right after a comma. */
function* settingPairs(line: string): Generator<[string, string]> {
  const setting = /\s*([^\s,:"][^,:"]*): *("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)/y;
  for (let position = 0; position < line.length; ) {
    setting.lastIndex = position;
    const [, key, value] = setting.exec(line) ?? [];
    if (key !== undefined && value !== undefined) yield [key, value];
    position = key !== undefined ? setting.lastIndex : line.indexOf(',', position) + 1 || line.length;
  }
}
