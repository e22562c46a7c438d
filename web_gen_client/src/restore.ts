/** From the plan of an image back to the form that makes it. */
import type { GenerationPlan } from 'ez-diffusion-client';
import { parseParameters, readMetadata } from './metadata';
import { get, set, type Json, type JsonObject } from './paths';
import { bringBack, pictureAt } from './pictures';
import { form, items, replaceForm, status } from './state';
import type { GalleryItem } from './storage';

const SAME_NAME = [
  'model', 'prompt', 'prompt_2', 'negative_prompt_2', 'width', 'height', 'num_inference_steps', 'guidance_scale', 'true_cfg_scale', 'guidance_rescale',
  'clip_skip', 'max_sequence_length', 'size_conditioning', 'refiner', 'strength', 'resize_mode', 'inpaint', 'loras', 'step_cache', 'acceleration', 'memory', 'output',
] as const satisfies readonly (keyof GenerationPlan)[];

function withoutNulls(value: Json): Json {
  if (Array.isArray(value)) return value.map(withoutNulls);
  if (typeof value !== 'object' || value === null) return value;
  return Object.fromEntries(Object.entries(value).filter(([, inner]) => inner !== null && inner !== undefined).map(([key, inner]) => [key, withoutNulls(inner)]));
}

/** The form of one image of a generation: its own seed, and everything that the plan decided. */
export function formOfPlan(plan: GenerationPlan): JsonObject {
  const planned = plan as unknown as JsonObject;
  const found: JsonObject = {};
  for (const name of SAME_NAME) if (planned[name] !== null && planned[name] !== undefined) found[name] = withoutNulls(planned[name]);
  found['negative_prompt'] = plan.negative_prompt ?? '';
  if (plan.scheduler.name) found['scheduler'] = plan.scheduler.name;
  const karras = plan.scheduler.options?.['use_karras_sigmas'];
  if (typeof karras === 'boolean') found['use_karras_sigmas'] = karras;
  if (!plan.image) delete found['resize_mode'];
  const seed = plan.seeds[plan.image_index ?? 0] ?? plan.seeds[0];
  if (seed !== undefined) found['seed'] = seed;
  if (plan.controlnets?.length) {
    found['controlnets'] = plan.controlnets.map(({ image: _image, mask_image: _mask, ...unit }) => {
      const { model, ...others } = withoutNulls(unit as unknown as JsonObject) as JsonObject;
      return model === plan.model ? others : { model: model ?? null, ...others };
    });
  }
  return found;
}

/** Where the plan used pictures, which a file does not hold. */
function pictureFields(plan: GenerationPlan): string[] {
  const controls = (plan.controlnets ?? []).flatMap((control, i) => [`controlnets[${i}].image`, ...(control.mask_image ? [`controlnets[${i}].mask_image`] : [])]);
  return [...(plan.image ? ['image'] : []), ...(plan.mask_image ? ['mask_image'] : []), ...controls];
}

function sameGeneration(plan: GenerationPlan): GalleryItem | undefined {
  const key = (other: GenerationPlan) => JSON.stringify({ ...other, image_index: null, environment: null });
  return items.value.find((item) => item.plan && key(item.plan) === key(plan));
}

export async function restorePlan(plan: GenerationPlan): Promise<void> {
  let next = formOfPlan(plan);
  const source = sameGeneration(plan)?.form;
  if (source) await bringBack(source);
  const missing: string[] = [];
  for (const path of pictureFields(plan)) {
    const known = source && get(source, path);
    if (pictureAt(known)) next = set(next, path, known);
    else missing.push(path);
  }
  replaceForm({ ...next, preview_interval: form.value['preview_interval'] ?? 0 }, true);
  status.value = missing.length ? `Settings restored. An image keeps no other pictures: give these again: ${missing.join(', ')}.` : 'Settings restored.';
}

/** What can be had from the line of parameters that other programs write. */
function restoreParameters(line: string): void {
  const parts = parseParameters(line);
  const number = (key: string) => (parts.has(key) && Number.isFinite(Number(parts.get(key))) ? Number(parts.get(key)) : undefined);
  const [width, height] = (parts.get('Size') ?? '').split('x').map(Number);
  const found = {
    prompt: parts.get('Prompt'), negative_prompt: parts.get('Negative prompt'), num_inference_steps: number('Steps'), guidance_scale: number('CFG scale'),
    seed: number('Seed'), width: width || undefined, height: height || undefined,
  };
  const known = Object.fromEntries(Object.entries(found).filter(([, value]) => value !== undefined)) as JsonObject;
  replaceForm({ ...form.value, ...known }, 'seed' in known);
  status.value = 'Another program made this image: prompt, size, steps, guidance and seed are restored.';
}

/** Read a dropped file and bring its settings back; false where it says nothing about itself. */
export async function restoreFile(file: Blob): Promise<boolean> {
  const { plan, parameters } = await readMetadata(file);
  if (plan) await restorePlan(plan);
  else if (parameters) restoreParameters(parameters);
  return plan !== null || parameters !== null;
}
