/** The form: what to make. */
import type { ModelInfo } from 'ez-diffusion-client';
import { useEffect, useState } from 'preact/hooks';
import { Controls, Loras } from './addons';
import { copyButtons } from './copy_menu';
import { Menu } from './menu';
import { SizeFields } from './size';
import { Errors, FieldInput, Section, Wrap } from './fields';
import { generate } from './jobs';
import { MaskEditor } from './mask_editor';
import { ImageInput } from './image_input';
import { imageAt } from './images';
import { Prompt } from './prompt';
import { References } from './references';
import { pathInWords, typedNumber, type Schema } from './schema';
import {
  applies,
  dryRun,
  edit,
  editsOnly,
  form,
  items,
  model,
  models,
  replaceFormUndoably,
  schema,
  seedLocked,
  shownItem,
  value,
} from './state';
import { warnings } from './errors';

/** Fields with their own place in the form; the rest of the schema is under "All parameters". */
const OWN_PLACE = new Set([
  'model',
  'prompt',
  'negative_prompt',
  'width',
  'height',
  'num_inference_steps',
  'guidance_scale',
  'scheduler',
  'num_images',
  'seed',
  'image',
  'mask_image',
  'strength',
  'resize_mode',
  'inpaint',
  'reference_images',
  'reference_weights',
  'expected_references',
  'loras',
  'controlnets',
  'request_id',
  'profile',
]);
const MAIN = ['num_inference_steps', 'guidance_scale', 'num_images', 'scheduler'];

/** Example prompts of the chosen model, until something else is typed. */
function Examples() {
  const examples = model.value?.example_prompts ?? [];
  const prompt = String(value('prompt') ?? '').trim();
  if (!examples.length || (prompt && !examples.includes(prompt))) return null;
  return (
    <div class="trigger-words examples wide" role="group" aria-label="Example prompts">
      {examples.map((text) => (
        <button type="button" key={text} aria-pressed={text === prompt} onClick={() => edit('prompt', text)}>
          {text}
        </button>
      ))}
    </div>
  );
}

/** A note for a model whose weights are not on the server yet. */
function weightsNote({ availability, download_gb: size }: ModelInfo): string {
  if (availability === 'missing') return ' · not on server';
  if (availability !== 'download') return '';
  return size ? ` · download ${size} GB` : ' · download';
}

/** What Generate does first if the weights of the model are not on the server. */
function WeightsNotice() {
  const found = model.value;
  if (!found || found.loaded || !found.availability || found.availability === 'available') return null;
  const license = found.license ? ` License: ${found.license}.` : '';
  const size = found.download_gb ? `about ${found.download_gb} GB` : 'its weights';
  return (
    <p class="weights" role="note">
      {found.availability === 'missing'
        ? `The weights of ${found.name} are not on the server, which does not download them.`
        : `The first Generate downloads ${size}.`}
      {license}
    </p>
  );
}

function ModelChoice() {
  const chosen = value('model');
  const found = model.value;
  return (
    <Wrap
      path="model"
      title="Model"
      description={found?.description ?? 'The model that generates the images'}
      wide
      extra={
        found && (
          <span class="note">
            {found.family}
            {found.loaded ? ', loaded' : ''}
            {found.license && found.availability !== 'available' ? `, ${found.license}` : ''}
          </span>
        )
      }
    >
      {(attributes) => (
        <select
          {...attributes}
          value={typeof chosen === 'string' ? chosen : ''}
          onChange={(event) => edit('model', event.currentTarget.value || undefined)}
        >
          <option value="">{models.value ? `${models.value.default} (default)` : '…'}</option>
          {typeof chosen === 'string' && !models.value?.models.some((offered) => offered.name === chosen) && (
            <option value={chosen}>{chosen} (unavailable)</option>
          )}
          {models.value?.models.map((offered) => (
            <option key={offered.name} value={offered.name}>
              {offered.title ? `${offered.name} – ${offered.title}` : offered.name}
              {weightsNote(offered)}
            </option>
          ))}
        </select>
      )}
    </Wrap>
  );
}

function ProfileChoice({ known }: { known: Schema }) {
  const offered = model.value?.profiles ?? [];
  const chosen = value('profile');
  if (offered.length === 0 && typeof chosen !== 'string') return null;
  const description =
    offered.find((profile) => profile.name === chosen)?.description ??
    known.field('GenerationRequest', 'profile').description;
  return (
    <Wrap path="profile" title="Profile" description={description}>
      {(attributes) => (
        <select
          {...attributes}
          value={typeof chosen === 'string' ? chosen : ''}
          onChange={(event) => edit('profile', event.currentTarget.value || undefined)}
        >
          <option value="">(none)</option>
          {['exact', ...offered.map((profile) => profile.name).filter((name) => name !== 'exact')].map((name) => (
            <option key={name} value={name}>
              {name}
            </option>
          ))}
          {typeof chosen === 'string' && chosen !== 'exact' && !offered.some((profile) => profile.name === chosen) && (
            <option value={chosen}>{chosen} (unavailable)</option>
          )}
        </select>
      )}
    </Wrap>
  );
}

function Seed({ known }: { known: Schema }) {
  const stored = value('seed');
  const locked = seedLocked.value;
  const last = shownItem.value ?? items.value[0];
  return (
    <Wrap path="seed" title="Seed" description={known.field('GenerationRequest', 'seed').description} wide>
      {(attributes) => (
        <div class="joined">
          <input
            {...attributes}
            type="number"
            min="0"
            step="1"
            inputMode="numeric"
            placeholder="random"
            class={locked ? '' : 'idle'}
            value={typeof stored === 'number' || typeof stored === 'string' ? stored : ''}
            onInput={(event) =>
              edit(
                'seed',
                event.currentTarget.value === '' ? undefined : typedNumber(event.currentTarget.value, 'integer'),
              )
            }
          />
          <button
            type="button"
            aria-pressed={locked}
            title="Keep this seed for the next images"
            onClick={() => {
              if (!locked && typeof stored !== 'number')
                edit('seed', last?.seed ?? crypto.getRandomValues(new Uint32Array(1))[0]);
              seedLocked.value = !locked;
            }}
          >
            {locked ? 'Locked' : 'Lock'}
          </button>
          <button
            type="button"
            disabled={!last}
            title="Use the seed of the image that is shown"
            onClick={() => last && edit('seed', last.seed)}
          >
            Reuse
          </button>
        </div>
      )}
    </Wrap>
  );
}

function StartImage({ known }: { known: Schema }) {
  const [painting, setPainting] = useState(false);
  const [image, mask] = [imageAt(value('image')), imageAt(value('mask_image'))];
  const field = (name: string) => known.field('GenerationRequest', name);
  return (
    <Section
      title="Image and mask"
      note={mask ? 'inpainting' : image ? 'image to image' : value('reference_images') || editsOnly.value ? 'edit' : 'text to image'}
      paths={['image', 'mask_image', 'strength', 'inpaint', 'resize_mode']}
      open={image !== undefined}
    >
      <div class="fields">
        <ImageInput
          path="image"
          title="Start image"
          description={field('image').description}
          actions={
            <button type="button" onClick={() => setPainting(true)}>
              {mask ? 'Change mask' : 'Paint mask'}
            </button>
          }
        />
        {(mask || image) && <ImageInput path="mask_image" title="Mask" description={field('mask_image').description} />}
        {image && <FieldInput field={field('strength')} slider={[0, 1]} />}
        {image && <FieldInput field={field('resize_mode')} />}
        {mask && field('inpaint').fields.map((inner) => <FieldInput key={inner.path} field={inner} />)}
      </div>
      {painting && image && (
        <MaskEditor image={image} mask={mask} path="mask_image" onClose={() => setPainting(false)} />
      )}
    </Section>
  );
}

function More({ known }: { known: Schema }) {
  const rest = known
    .fieldsOf('GenerationRequest')
    .filter((field) => !OWN_PLACE.has(field.name) && field.kind !== 'other' && applies(field.name));
  const simple = rest.filter((field) => field.kind !== 'object');
  return (
    <Section title="All parameters" paths={rest.map((field) => field.path)}>
      <div class="fields">
        {simple.map((field) => (
          <FieldInput key={field.path} field={field} wide={field.kind === 'text'} />
        ))}
      </div>
      {rest
        .filter((field) => field.kind === 'object')
        .map((field) => (
          <FieldInput key={field.path} field={field} />
        ))}
    </Section>
  );
}

/** The dry run: what the server would do, and its warnings. */
function DryRun() {
  const plan = dryRun.value;
  const facts = plan && [
    plan.task.replaceAll('_', ' '),
    plan.control_kind === 'none' ? '' : `${plan.control_kind} control`,
    `${plan.width} × ${plan.height}`,
    plan.denoising_steps === plan.num_inference_steps
      ? `${plan.num_inference_steps} steps`
      : `${plan.denoising_steps} of ${plan.num_inference_steps} steps`,
    plan.scheduler.name ?? plan.scheduler.class_name,
  ];
  return (
    <div class="dry-run">
      <span class="note" title={plan?.pipeline_class ?? ''}>
        {facts ? facts.filter(Boolean).join(' · ') : ' '}
      </span>
      {warnings.value.length > 0 && (
        <ul class="warnings">
          {warnings.value.map((warning) => (
            <li key={warning.message}>
              {warning.field ? `${pathInWords(warning.field)}: ` : ''}
              {warning.message}
            </li>
          ))}
        </ul>
      )}
    </div>
  );
}

export function Form() {
  const known = schema.value;
  useEffect(() => {
    const key = (event: KeyboardEvent) => {
      if (event.key !== 'Enter' || !(event.ctrlKey || event.metaKey) || document.querySelector('dialog[open]')) return;
      event.preventDefault();
      void generate();
    };
    addEventListener('keydown', key);
    return () => removeEventListener('keydown', key);
  }, []);
  if (!known)
    return (
      <form class="form" aria-label="Generation settings" aria-busy="true">
        <p class="note">Waiting for the server …</p>
      </form>
    );
  return (
    <form class="form" aria-label="Generation settings" onSubmit={(event) => (event.preventDefault(), void generate())}>
      <div class="form-body">
        <div class="fields prompts">
          <Prompt name="prompt" rows={5} known={known} />
          <Examples />
          {applies('negative_prompt') && <Prompt name="negative_prompt" rows={1} known={known} />}
        </div>
        <div class="settings">
          <div class="fields top">
            <ModelChoice />
            <SizeFields known={known} />
            {MAIN.filter(applies).map((name) => (
              <FieldInput key={name} field={known.field('GenerationRequest', name)} placeholder={placeholderOf(name)} />
            ))}
            <ProfileChoice known={known} />
            <Seed known={known} />
          </div>
          <StartImage known={known} />
          <References known={known} />
          <Controls known={known} />
          <Loras known={known} />
          <More known={known} />
        </div>
      </div>
      <div class="send">
        <div class="general">
          <Errors path="" />
        </div>
        <WeightsNotice />
        <DryRun />
        <div class="joined">
          <button type="submit" class="primary big">
            Generate <kbd>Ctrl Enter</kbd>
          </button>
          <Menu label="⋯" name="More form actions">
            {copyButtons(() => ({ form: form.value, lockSeed: seedLocked.value }))}
            <button type="button" onClick={() => replaceFormUndoably({}, false, 'Form cleared.')}>
              Clear the form
            </button>
          </Menu>
        </div>
      </div>
    </form>
  );
}

function placeholderOf(name: string): string | undefined {
  if (dryRun.value || !model.value) return undefined;
  const own = {
    width: model.value.width,
    height: model.value.height,
    num_inference_steps: model.value.num_inference_steps,
    guidance_scale: model.value.guidance_scale,
    num_images: 1,
  }[name];
  return own === null || own === undefined ? undefined : String(own);
}
