/** Values as JSON has them, and paths into them as error messages write them: `controlnets[0].image`. */
export type Json = null | boolean | number | string | Json[] | { [key: string]: Json };
export type JsonObject = { [key: string]: Json };
type Step = string | number;

export function isObject(value: unknown): value is JsonObject {
  return typeof value === 'object' && value !== null && !Array.isArray(value);
}

export function steps(path: string): Step[] {
  return [...path.matchAll(/\[(\d+)\]|[^.[\]]+/g)].map(([text, index]) => (index === undefined ? text : Number(index)));
}

export function join(path: string, step: Step): string {
  if (typeof step === 'number') return `${path}[${step}]`;
  return path ? `${path}.${step}` : step;
}

export function get(value: Json | undefined, path: string): Json | undefined {
  let found = value;
  for (const step of steps(path)) {
    if (Array.isArray(found) && typeof step === 'number') found = found[step];
    else if (isObject(found) && typeof step === 'string') found = found[step];
    else return undefined;
  }
  return found;
}

/** A copy with the value at `path` replaced; `undefined` removes it. */
export function set(value: JsonObject, path: string, changed: Json | undefined): JsonObject {
  return put(value, steps(path), changed) as JsonObject;
}

function put(value: Json | undefined, [first, ...rest]: Step[], changed: Json | undefined): Json | undefined {
  if (first === undefined) return changed;
  if (typeof first === 'number') {
    const list = Array.isArray(value) ? [...value] : [];
    const inner = put(list[first], rest, changed);
    if (inner === undefined) list.splice(first, 1);
    else list[first] = inner;
    return list;
  }
  const { [first]: old, ...others } = isObject(value) ? value : {};
  const inner = put(old, rest, changed);
  if (inner === undefined) return others;
  return isObject(value) && first in value ? { ...value, [first]: inner } : { ...others, [first]: inner };
}

/** Every string in a value, changed. */
export function mapStrings(value: Json, change: (text: string) => string): Json {
  if (typeof value === 'string') return change(value);
  if (Array.isArray(value)) return value.map((item) => mapStrings(item, change));
  if (isObject(value))
    return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, mapStrings(item, change)]));
  return value;
}
