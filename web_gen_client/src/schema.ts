/** The form follows the server's OpenAPI document: names, types, bounds, defaults and descriptions. */
import { isObject, join, type Json, type JsonObject } from './paths';

export interface Field {
  name: string;
  path: string;
  kind: 'integer' | 'number' | 'boolean' | 'text' | 'choice' | 'list' | 'pairs' | 'object' | 'image' | 'other';
  description: string;
  choices: string[];
  minimum: number | undefined;
  maximum: number | undefined;
  step: number | undefined;
  initial: Json | undefined;
  fields: Field[];
}

const LABELS: Record<string, string> = {
  num_inference_steps: 'Steps',
  guidance_scale: 'Guidance',
  num_images: 'Images',
  clip_skip: 'CLIP skip',
  true_cfg_scale: 'True CFG',
  prompt_2: 'Second prompt',
  negative_prompt_2: 'Second negative prompt',
  use_karras_sigmas: 'Karras sigmas',
  sigma_schedule: 'Noise schedule',
  eta: 'Eta',
  subseed: 'Variation seed',
  subseed_strength: 'Variation strength',
  preview_interval: 'Preview every',
  timeout_seconds: 'Time limit',
  conditioning_scale: 'Weight',
  guidance_start: 'Start',
  guidance_end: 'End',
  max_sequence_length: 'T5 tokens',
  vae_dtype: 'VAE dtype',
  vae_tiling: 'VAE tiling',
  torch_compile: 'torch.compile',
  mask_blur: 'Mask blur',
};

/** The name of a field as the page shows it. */
export function label(name: string): string {
  const known = LABELS[name];
  if (known) return known;
  const words = name.replaceAll('_', ' ');
  return words.charAt(0).toUpperCase() + words.slice(1);
}

const LISTS: Record<string, string> = { loras: 'LoRA', controlnets: 'Control' };

/** A path of a request in words: `controlnets[0].guidance_start` is "Control 1, Start". */
export function pathInWords(path: string): string {
  return path
    .split('.')
    .map((step) => {
      const [name = '', index] = step.replace(']', '').split('[');
      return index === undefined ? label(name) : `${LISTS[name] ?? label(name)} ${Number(index) + 1}`;
    })
    .join(', ');
}

export class Schema {
  private readonly schemas: JsonObject;

  constructor(document: Json) {
    const components = isObject(document) && isObject(document['components']) ? document['components'] : {};
    this.schemas = isObject(components['schemas']) ? components['schemas'] : {};
    if (!isObject(this.schemas['GenerationRequest']))
      throw new Error('the OpenAPI document of the server has no GenerationRequest');
  }

  /** The fields of a type, in the order of the document. */
  fieldsOf(type: string, path = ''): Field[] {
    return this.properties(this.resolve({ $ref: `#/components/schemas/${type}` }), path);
  }

  field(type: string, name: string, path = ''): Field {
    const found = this.fieldsOf(type, path).find((field) => field.name === name);
    if (!found) throw new Error(`the OpenAPI document of the server has no ${type}.${name}`);
    return found;
  }

  private properties(schema: JsonObject, path: string): Field[] {
    const properties = isObject(schema['properties']) ? schema['properties'] : {};
    return Object.entries(properties).map(([name, value]) =>
      this.read(name, isObject(value) ? value : {}, join(path, name)),
    );
  }

  private resolve(schema: JsonObject): JsonObject {
    const reference = schema['$ref'];
    if (typeof reference === 'string') {
      const name = reference.split('/').at(-1) ?? '';
      const target = this.schemas[name];
      return this.resolve({ ...(isObject(target) ? target : {}), 'x-name': name });
    }
    const { allOf, ...own } = schema;
    if (!Array.isArray(allOf)) return schema;
    return allOf.reduce<JsonObject>(
      (merged, part) => ({ ...(isObject(part) ? this.resolve(part) : {}), ...merged }),
      own,
    );
  }

  private read(name: string, raw: JsonObject, path: string): Field {
    const schema = this.resolve(raw);
    const kind = this.kindOf(schema);
    const number = (key: string) => (typeof schema[key] === 'number' ? schema[key] : undefined);
    return {
      name,
      path,
      kind,
      description: typeof schema['description'] === 'string' ? schema['description'] : '',
      choices: Array.isArray(schema['enum']) ? schema['enum'].map(String) : [],
      minimum: number('minimum'),
      maximum: number('maximum'),
      step: number('multipleOf') ?? (kind === 'integer' ? 1 : undefined),
      initial: schema['default'],
      fields: kind === 'object' ? this.properties(schema, path) : [],
    };
  }

  private kindOf(schema: JsonObject): Field['kind'] {
    if (schema['x-name'] === 'ImageString') return 'image';
    if (Array.isArray(schema['enum'])) return 'choice';
    const items = isObject(schema['items']) ? this.resolve(schema['items']) : {};
    switch (schema['type']) {
      case 'integer':
        return 'integer';
      case 'number':
        return 'number';
      case 'boolean':
        return 'boolean';
      case 'string':
        return 'text';
      case 'array':
        return items['type'] === 'integer' ? 'list' : 'other';
      case 'object':
        return isObject(schema['properties']) ? 'object' : 'pairs';
      default:
        return 'other';
    }
  }
}

/** Parse a typed number. Other text and unsafe integers stay strings, which the server rejects. */
export function typedNumber(text: string, kind: Field['kind']): number | string {
  const number = Number(text);
  if (text.trim() === '' || !Number.isFinite(number)) return text;
  return kind === 'integer' && Number.isInteger(number) && !Number.isSafeInteger(number) ? text.trim() : number;
}

/** What a field accepts, in a few words. */
export function allowed(field: Field): string {
  if (field.minimum === undefined && field.maximum === undefined) return '';
  const range = field.maximum === undefined ? `from ${field.minimum}` : `${field.minimum ?? ''} to ${field.maximum}`;
  return field.step && field.step > 1 ? `${range}, a multiple of ${field.step}` : range;
}
