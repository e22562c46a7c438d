/** Migrates forms and plans stored in the browser by earlier versions; the server migrates those inside images. */
import type { GenerationPlan } from 'ez-diffusion-client';
import { isObject, type Json, type JsonObject } from './paths';

const PLAN_VERSION = 2;
const RENAMED: Record<string, string> = { cache_interval: 'interval', cache_branch_id: 'branch' };
const VALUES: Record<string, Json> = { step_cache: 'deep_features', bf16: 'bfloat16', full: null };

const renamedValue = (value: Json | undefined): Json =>
  typeof value === 'string' ? (VALUES[value] ?? (value in VALUES ? null : value)) : (value ?? null);

function withoutNulls(section: JsonObject): JsonObject | undefined {
  const given = Object.entries(section).filter(([, value]) => value !== null && value !== undefined);
  return given.length ? Object.fromEntries(given) : undefined;
}

/** Migrate the speed and memory settings of a version 1 plan or form; later ones are unchanged. */
export function upgradeSettings(fields: JsonObject): JsonObject {
  const { deepcache, acceleration, ...others } = fields;
  const {
    step_cache: method = null,
    step_cache_threshold: threshold = null,
    step_cache_interval: interval = null,
    reuse_control_residuals: reuse = null,
    batch_size = null,
    vae_tiling = null,
    compute_dtype = null,
    vae_precision,
    ...rest
  } = isObject(acceleration) ? acceleration : {};
  const upgraded: JsonObject = { ...others };
  const add = (name: string, section: JsonObject) => {
    const given = withoutNulls({ ...section, ...(isObject(others[name]) ? others[name] : {}) });
    if (given) upgraded[name] = given;
  };
  if (isObject(deepcache)) {
    const named = Object.entries(deepcache).map(([name, value]) => [RENAMED[name] ?? name, value] as const);
    add('step_cache', {
      ...Object.fromEntries(named),
      method: renamedValue(deepcache['method'] ?? 'deepcache'),
      reuse_control_residuals: reuse,
    });
  } else if (method !== null) {
    add('step_cache', { method, threshold, interval });
  }
  add('acceleration', { dtype: compute_dtype, vae_dtype: renamedValue(vae_precision), ...rest });
  add('memory', { batch_size, vae_tiling });
  return upgraded;
}

/** Migrate a stored version 1 plan to the current schema. */
export function upgradePlan(plan: GenerationPlan): GenerationPlan {
  if (plan.plan_version !== 1) return plan;
  return { ...upgradeSettings(plan as unknown as JsonObject), plan_version: PLAN_VERSION } as unknown as GenerationPlan;
}
