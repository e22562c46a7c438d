/** The request as something to run elsewhere. */
import { isObject, type Json, type JsonObject } from './paths';
import { requestOf, serverUrl, token } from './state';

export type Language = 'python' | 'curl' | 'json';
const LONGEST_ARGUMENT = 100_000;

function python(value: Json): string {
  if (value === null) return 'None';
  if (typeof value === 'boolean') return value ? 'True' : 'False';
  if (Array.isArray(value)) return `[${value.map(python).join(', ')}]`;
  if (isObject(value))
    return `{${Object.entries(value)
      .map(([key, inner]) => `${JSON.stringify(key)}: ${python(inner)}`)
      .join(', ')}}`;
  return JSON.stringify(value);
}

function asPython(body: JsonObject): string {
  const format =
    isObject(body['output']) && typeof body['output']['format'] === 'string' ? body['output']['format'] : 'png';
  const fields = Object.entries(body)
    .map(([name, value]) => `    ${name}=${python(value)},\n`)
    .join('');
  return [
    'from pathlib import Path',
    '',
    'from ez_diffusion_client import Client, image_bytes',
    '',
    ...(token.value ? ['# the token is read from DIFFUSION_WORKERS_TOKEN'] : []),
    `with Client(${JSON.stringify(serverUrl)}) as client:`,
    `    result = client.generate(\n${fields.replaceAll(/^(?=.)/gm, '    ')}    )`,
    'for index, data in enumerate(image_bytes(result)):',
    `    Path(f"image-{index}.${format}").write_bytes(data)`,
    '',
  ].join('\n');
}

function asCurl(body: JsonObject): string {
  const authorization = token.value ? ' -H "Authorization: Bearer $DIFFUSION_WORKERS_TOKEN"' : '';
  const command = `curl -X POST ${serverUrl}/generate -H 'Content-Type: application/json'${authorization}`;
  const text = JSON.stringify(body);
  if (text.length > LONGEST_ARGUMENT) return `${command} --data-binary @- <<'JSON'\n${text}\nJSON\n`;
  return `${command} -d '${text.replaceAll("'", "'\\''")}'\n`;
}

export function codeOf(form: JsonObject, language: Language, lockSeed: boolean): string {
  const { preview_interval: _shown, ...body } = requestOf(form, lockSeed) as unknown as JsonObject;
  if (language === 'python') return asPython(body);
  return language === 'curl' ? asCurl(body) : `${JSON.stringify(body, null, 2)}\n`;
}

/** Copy text to the clipboard, even outside a secure context. */
export async function copy(text: string): Promise<void> {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = document.createElement('textarea');
  area.value = text;
  document.body.append(area);
  area.select();
  document.execCommand('copy');
  area.remove();
}
