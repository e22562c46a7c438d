/** LoRAs and ControlNet units of the request. */
import { useEffect, useState } from 'preact/hooks';
import {
  OperationError,
  type ControlMap,
  type ControlNetInfo,
  type PreprocessorInfo,
  type PreprocessRequest,
} from 'ez-diffusion-client';
import { forgetTouched, sentence } from './errors';
import { FieldInput, Section, Wrap } from './fields';
import { MaskEditor } from './mask_editor';
import { isObject, type Json, type JsonObject } from './paths';
import { ImageInput } from './image_input';
import { addImage, imageAt, reference } from './images';
import type { Field, Schema } from './schema';
import { controlMap } from './server';
import { dryRun, edit, model, models, value } from './state';

const MAP_DELAY_MS = 400;

function list(path: string): Json[] {
  const found = value(path);
  return Array.isArray(found) ? found : [];
}

function named(fields: Field[], name: string): Field {
  const found = fields.find((field) => field.name === name);
  if (!found) throw new Error(`the schema of the server has no field ${name}`);
  return found;
}

function removeFrom(path: string, index: number): void {
  const rest = list(path).filter((_, i) => i !== index);
  forgetTouched(path);
  edit(path, rest.length ? rest : undefined);
}

/** Trigger words of a LoRA; each button adds one to the prompt. */
function TriggerWords({ name }: { name: Json | undefined }) {
  const words = typeof name === 'string' ? (model.value?.trigger_words?.[name] ?? []) : [];
  const prompt = String(value('prompt') ?? '');
  if (!words.length) return null;
  return (
    <div class="trigger-words wide" role="group" aria-label="Trigger words">
      <span class="note">Trigger words</span>
      {words.map((word) => {
        const used = prompt.toLowerCase().includes(word.toLowerCase());
        return (
          <button
            type="button"
            key={word}
            disabled={used}
            title={used ? 'In the prompt' : 'Add to the prompt'}
            onClick={() => edit('prompt', [prompt.trim(), word].filter(Boolean).join(', '))}
          >
            {word}
          </button>
        );
      })}
    </div>
  );
}

export function Loras({ known }: { known: Schema }) {
  const units = list('loras');
  const offered = model.value?.loras ?? [];
  const add = (name: string) => edit('loras', [...units, { name, scale: 1 }]);
  return (
    <Section
      title="LoRA"
      note={units.length ? `${units.length} active` : offered.length ? `${offered.length} available` : undefined}
      paths={['loras']}
      open={units.length > 0}
    >
      {units.map((_, i) => {
        const fields = known.fieldsOf('Lora', `loras[${i}]`);
        return (
          <fieldset class="unit" key={i}>
            <legend>LoRA {i + 1}</legend>
            <div class="fields">
              <FieldInput
                field={named(fields, 'name')}
                choices={offered}
                placeholder="a name, file.safetensors or owner/repository"
                free
                wide
              />
              <TriggerWords name={value(`loras[${i}].name`)} />
              <FieldInput field={named(fields, 'scale')} slider={[0, 2]} />
              <FieldInput field={named(fields, 'text_encoder_scale')} placeholder="as scale" />
              <FieldInput field={named(fields, 'block_scales')} placeholder="up.0=0.5, mid=1" wide />
            </div>
            <div class="actions">
              <button type="button" onClick={() => removeFrom('loras', i)} aria-label={`Remove LoRA ${i + 1}`}>
                Remove
              </button>
            </div>
          </fieldset>
        );
      })}
      <div class="actions">
        {offered.map((name) => (
          <button type="button" key={name} onClick={() => add(name)}>
            + {name}
          </button>
        ))}
        <button type="button" onClick={() => add('')}>
          {offered.length ? '+ other' : 'Add a LoRA'}
        </button>
      </div>
      {!offered.length && (
        <p class="note">
          No LoRAs are listed for this model. If its manifest allows it, enter a file or repository.
        </p>
      )}
    </Section>
  );
}

/** The control map of a unit, recomputed (debounced) when the image or the preprocessing changes. */
function useMap(unit: JsonObject, size: { width: number; height: number } | null) {
  const [map, setMap] = useState<ControlMap | null>(null);
  const [problem, setProblem] = useState('');
  const [busy, setBusy] = useState(false);
  const image = imageAt(unit['image']);
  const mask = imageAt(unit['mask_image']) ?? imageAt(value('mask_image'));
  const { preprocessing } = unit;
  const wanted =
    isObject(preprocessing) && preprocessing['name'] && image
      ? JSON.stringify([preprocessing, image.id, mask?.id, unit['resize_mode'], size])
      : '';
  useEffect(() => {
    setProblem('');
    if (!wanted || !image) {
      setBusy(false);
      return setMap(null);
    }
    setBusy(true);
    const stopping = new AbortController();
    const timer = setTimeout(async () => {
      const asked = {
        image: image.dataUri,
        preprocessing,
        ...(size ?? {}),
        ...(unit['resize_mode'] ? { resize_mode: unit['resize_mode'] } : {}),
      };
      const body = { ...asked, ...(mask ? { mask_image: mask.dataUri } : {}) } as unknown as PreprocessRequest;
      try {
        setMap(await controlMap(body, stopping.signal));
      } catch (error) {
        if (stopping.signal.aborted) return;
        setMap(null);
        setProblem(
          error instanceof OperationError
            ? (error.result.errors ?? []).map(sentence).join('; ') || error.message
            : String(error),
        );
      }
      setBusy(false);
    }, MAP_DELAY_MS);
    return () => (clearTimeout(timer), stopping.abort());
  }, [wanted]);
  return { map, problem, busy };
}

/** The inputs of a preprocessor, from the list of its parameters. */
function parameterFields(info: PreprocessorInfo | undefined, path: string): Field[] {
  return (info?.parameters ?? []).map(({ name, kind, default: initial, minimum, maximum, description }) => ({
    name,
    path: `${path}.parameters.${name}`,
    kind,
    description: description ?? '',
    choices: [],
    minimum: minimum ?? undefined,
    maximum: maximum ?? undefined,
    step: kind === 'integer' ? 1 : undefined,
    initial: kind === 'boolean' ? initial === 1 : initial,
    fields: [],
  }));
}

/** Preprocessors in groups: those for the ControlNet, others without weights, others with weights. */
function PreprocessorChoice({
  path,
  name,
  controlnet,
  description,
}: {
  path: string;
  name: string;
  controlnet: ControlNetInfo | undefined;
  description: string;
}) {
  const all = models.value?.preprocessors ?? [];
  const own = controlnet?.preprocessors ?? [];
  const others = all.filter((info) => !own.includes(info.name));
  const groups: [string, string[]][] = [
    ['for this ControlNet', own],
    ['others', others.filter((info) => !info.weights).map((info) => info.name)],
    ['with weights', others.filter((info) => info.weights).map((info) => info.name)],
  ];
  const known = groups.some(([, names]) => names.includes(name));
  return (
    <Wrap
      path={`${path}.name`}
      title="Preprocessor"
      description={all.find((info) => info.name === name)?.title ?? description}
    >
      {(attributes) => (
        <select
          {...attributes}
          value={name}
          onChange={(event) => edit(path, event.currentTarget.value ? { name: event.currentTarget.value } : undefined)}
        >
          <option value="">None (already a control map)</option>
          {name && !known && <option value={name}>{name}</option>}
          {groups
            .filter(([, names]) => names.length)
            .map(([title, names]) => (
              <optgroup key={title} label={title}>
                {names.map((choice) => (
                  <option key={choice} value={choice}>
                    {choice.replaceAll('_', ' ')}
                  </option>
                ))}
              </optgroup>
            ))}
        </select>
      )}
    </Wrap>
  );
}

function mapUri(map: ControlMap): string {
  return map.image.startsWith('data:') ? map.image : `data:image/png;base64,${map.image}`;
}

/** The size of the generation, so that the map shown is the one used; a size still being typed is rounded. */
function plannedSize(): { width: number; height: number } | null {
  const plan = dryRun.value;
  const [width, height] = [
    value('width') ?? plan?.width ?? model.value?.width,
    value('height') ?? plan?.height ?? model.value?.height,
  ];
  const rounded = (side: number) => Math.min(8192, Math.max(64, Math.round(side / 8) * 8));
  return typeof width === 'number' && typeof height === 'number'
    ? { width: rounded(width), height: rounded(height) }
    : null;
}

function ControlUnit({ known, index }: { known: Schema; index: number }) {
  const path = `controlnets[${index}]`;
  const fields = known.fieldsOf('ControlNetUnit', path);
  const [painting, setPainting] = useState(false);
  const found = value(path);
  const unit = isObject(found) ? found : {};
  const controlnets = model.value?.controlnets ?? [];
  const controlnet =
    controlnets.find((offered) => offered.name === unit['model']) ??
    (controlnets.length === 1 ? controlnets[0] : undefined);
  const preprocessing = named(fields, 'preprocessing');
  const name = isObject(unit['preprocessing']) ? String(unit['preprocessing']['name'] ?? '') : '';
  const info = models.value?.preprocessors?.find((offered) => offered.name === name);
  const { map, problem, busy } = useMap(unit, plannedSize());
  const image = imageAt(unit['image']);
  const beside =
    name && (map || busy) ? (
      <figure class="map" aria-busy={busy}>
        {map ? (
          <img src={mapUri(map)} alt={`Control map by ${map.preprocessor ?? name}`} />
        ) : (
          <div class="empty">…</div>
        )}
      </figure>
    ) : undefined;
  return (
    <fieldset class="unit">
      <legend>Control {index + 1}</legend>
      <div class="fields">
        <FieldInput field={named(fields, 'enabled')} />
        <FieldInput
          field={named(fields, 'model')}
          title="ControlNet"
          choices={controlnets.map((offered) => offered.name)}
          placeholder={dryRun.value?.controlnets?.[index]?.model ?? 'automatic'}
          free
        />
        {controlnet && controlnet.availability && controlnet.availability !== 'available' && (
          <p class="weights wide">
            {controlnet.availability === 'missing'
              ? `The weights of ${controlnet.name} are not on the server.`
              : `${controlnet.name} is downloaded when it is first used.`}
          </p>
        )}
        <PreprocessorChoice
          path={preprocessing.path}
          name={name}
          controlnet={controlnet}
          description={preprocessing.description}
        />
        <ImageInput
          path={`${path}.image`}
          title={name ? 'Image and its map' : 'Control map'}
          description="What the control is read from"
          beside={beside}
          actions={
            <button type="button" disabled={!image} onClick={() => setPainting(true)}>
              {unit['mask_image'] ? 'Change mask' : 'Mask'}
            </button>
          }
        />
        {problem && (
          <p class="errors wide" role="alert">
            {problem}
          </p>
        )}
        {unit['mask_image'] !== undefined && (
          <ImageInput
            path={`${path}.mask_image`}
            title="Control mask"
            description={named(fields, 'mask_image').description}
          />
        )}
        {controlnet?.union && (
          <FieldInput
            field={named(fields, 'union_mode')}
            choices={controlnet.union_modes ?? []}
            placeholder="from preprocessor"
          />
        )}
        <FieldInput field={named(fields, 'conditioning_scale')} slider={[0, 2]} />
        <FieldInput field={named(fields, 'control_mode')} />
        <FieldInput field={named(fields, 'guidance_start')} slider={[0, 1]} />
        <FieldInput field={named(fields, 'guidance_end')} slider={[0, 1]} />
        {info
          ? parameterFields(info, preprocessing.path).map((field) => (
              <FieldInput key={field.path} field={field} slider />
            ))
          : name && <FieldInput field={named(preprocessing.fields, 'parameters')} wide />}
        {name && <FieldInput field={named(preprocessing.fields, 'resolution')} placeholder="pixel perfect" />}
        <FieldInput field={named(fields, 'resize_mode')} />
        <FieldInput field={named(fields, 'return_map')} />
      </div>
      <div class="actions">
        {name && map && (
          <button
            type="button"
            onClick={async () => (
              edit(`${path}.image`, reference(await addImage(mapUri(map)))),
              edit(`${path}.preprocessing`, undefined)
            )}
          >
            Keep the map
          </button>
        )}
        <button
          type="button"
          onClick={() => removeFrom('controlnets', index)}
          aria-label={`Remove control ${index + 1}`}
        >
          Remove
        </button>
      </div>
      {painting && image && (
        <MaskEditor
          image={image}
          mask={imageAt(unit['mask_image'])}
          path={`${path}.mask_image`}
          onClose={() => setPainting(false)}
        />
      )}
    </fieldset>
  );
}

export function Controls({ known }: { known: Schema }) {
  const units = list('controlnets');
  const controlnets = model.value?.controlnets ?? [];
  const add = () => {
    const first = controlnets[0]?.preprocessors?.[0];
    const unit: JsonObject = first ? { preprocessing: { name: first } } : {};
    edit('controlnets', [
      ...units,
      controlnets.length > 1 && controlnets[0] ? { model: controlnets[0].name, ...unit } : unit,
    ]);
  };
  return (
    <Section
      title="ControlNet"
      note={units.length ? `${units.length} active` : controlnets.length ? `${controlnets.length} available` : 'none available'}
      paths={['controlnets']}
      open={units.length > 0}
    >
      {units.map((_, i) => (
        <ControlUnit key={i} known={known} index={i} />
      ))}
      <div class="actions">
        <button type="button" onClick={add}>
          Add a control
        </button>
      </div>
    </Section>
  );
}
