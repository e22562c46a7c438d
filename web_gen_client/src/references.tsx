/** Reference images, numbered for the prompt: several per drop, reordered by drag or keyboard. */
import type { ComponentChildren } from 'preact';
import { useEffect, useRef, useState } from 'preact/hooks';
import { forgetTouched } from './errors';
import { Errors, Section, usePlace } from './fields';
import { ITEM_TYPE } from './image_input';
import { addImage, imageAt, reference } from './images';
import type { Json } from './paths';
import type { Schema } from './schema';
import { applies, dryRun, edit, itemAt, maxReferences, status, value } from './state';

const FIELD = 'reference_images';
const WEIGHTS = 'reference_weights';
const EXPECTED = 'expected_references';
const MOVED_TYPE = 'application/x-reference';

function listed(): Json[] {
  const found = value(FIELD);
  return Array.isArray(found) ? found : [];
}

/** The weights as the form has them, one for each image; undefined are equal shares. */
function weights(): Json[] | undefined {
  const found = value(WEIGHTS);
  return Array.isArray(found) ? found : undefined;
}

/** The images that a restored request was made with, by size and hash. */
function expected(): Json[] {
  const found = value(EXPECTED);
  return Array.isArray(found) ? found : [];
}

function change(list: Json[], weighed = weights()): void {
  forgetTouched(FIELD);
  if (list.length < listed().length) edit(EXPECTED, undefined); // removing one gives up on the original list
  edit(FIELD, list.length ? list : undefined);
  edit(WEIGHTS, list.length ? weighed : undefined);
}

/** The weights after adding an image; an image that a restored request still lacks already has one. */
function weightsOfOneMore(): Json[] | undefined {
  const [known, count] = [weights(), listed().length];
  return known && known.length <= count ? [...known, 1 / (count + 1)] : known;
}

/** Give up on the images that a restored request lacks. */
function doWithout(): void {
  edit(EXPECTED, undefined);
  edit(WEIGHTS, weights()?.slice(0, listed().length));
  if (!listed().length) edit(WEIGHTS, undefined);
}

/** The weights after an image moved. */
function moveWeight(from: number, to: number): Json[] | undefined {
  const [known, moved] = [weights(), weights()?.[from]];
  if (!known || moved === undefined) return known;
  const rest = known.filter((_, at) => at !== from);
  return [...rest.slice(0, to), moved, ...rest.slice(to)];
}

/** Set the weight of an image; the others keep theirs, or their equal share. */
function weigh(index: number, typed: string): void {
  const share = 1 / listed().length;
  const next = listed().map((_, at) => weights()?.[at] ?? share);
  next[index] = typed === '' ? share : Number(typed);
  edit(WEIGHTS, next.some((weight) => weight !== share) ? next : undefined);
}

/** Append images up to the model's limit; returns a message for each one not added. */
export async function addReferences(files: readonly { name: string; blob: Blob }[]): Promise<string[]> {
  const problems: string[] = [];
  for (const { name, blob } of files) {
    if (listed().length >= maxReferences.value) {
      const most = maxReferences.value === 0 ? 'no reference images' : `at most ${maxReferences.value}`;
      problems.push(`${name} was not added: this model takes ${most}.`);
      continue;
    }
    try {
      const added = reference(await addImage(blob));
      change([...listed(), added], weightsOfOneMore());
    } catch (error) {
      problems.push(`${name}: ${error instanceof Error ? error.message : String(error)}.`);
    }
  }
  return problems;
}

/** Use an image of the gallery as the next reference. */
export async function useAsReference(blob: Blob): Promise<void> {
  const [problem] = await addReferences([{ name: 'The image', blob }]);
  status.value = problem ?? `The image is reference image ${listed().length} now.`;
}

/** The images of a drop or of the clipboard: files, or one that is dragged from the gallery. */
function filesIn(data: DataTransfer | null): { name: string; blob: Blob }[] {
  const item = data && itemAt(data.getData(ITEM_TYPE));
  if (item) return [{ name: 'The image', blob: item.blob }];
  return [...(data?.files ?? [])].map((file) => ({ name: file.name, blob: file }));
}

interface OneProps {
  index: number;
  count: number;
  move: (from: number, to: number) => void;
  remove: (index: number) => void;
}

/** One image with its number, its size, and the size at which the model sees it. */
function One({ index, count, move, remove }: OneProps) {
  const path = `${FIELD}[${index}]`;
  const place = usePlace(path);
  const weight = usePlace(`${WEIGHTS}[${index}]`);
  const [over, setOver] = useState(false);
  const image = imageAt(listed()[index]);
  const number = index + 1;
  const size = image ? `${image.width} × ${image.height}` : 'an address';
  const planned = dryRun.value?.reference_images?.[index];
  const same = !planned || (planned.used_width === planned.width && planned.used_height === planned.height);
  const button = (name: string, text: ComponentChildren, disabled: boolean, act: () => void) => (
    <button
      type="button"
      data-act={name}
      aria-label={`${name}: reference image ${number}`}
      title={name}
      {...{ disabled }}
      onClick={act}
    >
      {text}
    </button>
  );
  return (
    <li
      class={over ? 'over' : ''}
      draggable
      data-index={index}
      onDragStart={(event) => {
        event.dataTransfer?.setData(MOVED_TYPE, String(index));
        event.stopPropagation();
      }}
      onDragOver={(event) => event.dataTransfer?.types.includes(MOVED_TYPE) && setOver(true)}
      onDragLeave={() => setOver(false)}
      onDrop={(event) => {
        setOver(false);
        const from = event.dataTransfer?.getData(MOVED_TYPE);
        if (!from) return;
        event.preventDefault();
        event.stopPropagation();
        move(Number(from), index);
      }}
    >
      <div class="reference" ref={place}>
        <span class="number" aria-hidden="true">
          {number}
        </span>
        {image ? (
          <img src={image.dataUri} alt={`Reference image ${number}, ${size}`} draggable={false} />
        ) : (
          <span class="note address">{String(listed()[index])}</span>
        )}
        <span class="note">
          {size}
          {!same && ` → ${planned.used_width} × ${planned.used_height}`}
        </span>
        {applies(WEIGHTS) && (
          <div ref={weight}>
            <input
              type="number"
              min="0"
              max="10"
              step="0.05"
              aria-label={`Weight of reference image ${number}`}
              title="Weight; leave empty for an equal share"
              placeholder={(1 / count).toFixed(2)}
              value={String(weights()?.[index] ?? '')}
              onChange={(event) => weigh(index, event.currentTarget.value)}
            />
          </div>
        )}
        <Errors path={`${WEIGHTS}[${index}]`} />
        <div class="joined">
          {button('Move earlier', '←', index === 0, () => move(index, index - 1))}
          {button('Move later', '→', index === count - 1, () => move(index, index + 1))}
          {button('Remove', '✕', false, () => remove(index))}
        </div>
        <Errors path={path} />
      </div>
    </li>
  );
}

/** The images that a restored request still lacks, and a button to proceed without them. */
function Missing() {
  const images = expected();
  if (listed().length >= images.length) return null;
  const facts = images.map((image, index) => {
    const { width, height, sha256 } = image as { width: number; height: number; sha256: string };
    return `image ${index + 1} (${width} × ${height}, sha256 ${sha256.slice(0, 12)}…)`;
  });
  return (
    <div class="missing" role="alert">
      <p class="note">
        The image was made with {images.length === 1 ? '1 reference image' : `${images.length} reference images`}, of
        which its metadata has the hashes alone. Add them again in their order: {facts.join(', ')}.
      </p>
      <button type="button" onClick={doWithout}>
        Generate without them
      </button>
    </div>
  );
}

export function References({ known }: { known: Schema }) {
  const place = usePlace(FIELD);
  const weighed = usePlace(WEIGHTS);
  const chooser = useRef<HTMLInputElement>(null);
  const list = useRef<HTMLOListElement>(null);
  const focus = useRef<{ index: number; act: string } | null>(null);
  const [over, setOver] = useState(false);
  const [problems, setProblems] = useState<string[]>([]);
  const [said, setSaid] = useState('');
  const images = listed();
  const limit = maxReferences.value;
  useEffect(() => {
    if (!focus.current) return;
    const { index, act } = focus.current;
    focus.current = null;
    const buttons = [...(list.current?.querySelectorAll<HTMLButtonElement>(`[data-index="${index}"] button`) ?? [])];
    const wanted = buttons.find((button) => button.dataset['act'] === act && !button.disabled);
    (wanted ?? buttons.find((button) => !button.disabled))?.focus();
  });
  const lacking = expected().length - images.length;
  if (!limit && !images.length && lacking <= 0) return null;

  const take = async (files: { name: string; blob: Blob }[]) => {
    setProblems(files.length ? await addReferences(files) : ['No image was dropped.']);
  };
  const move = (from: number, to: number) => {
    const moved = images[from];
    if (moved === undefined || from === to) return;
    const rest = images.filter((_, i) => i !== from);
    focus.current = { index: to, act: from < to ? 'Move later' : 'Move earlier' };
    setSaid(`Image ${from + 1} is image ${to + 1} now.`);
    change([...rest.slice(0, to), moved, ...rest.slice(to)], moveWeight(from, to));
  };
  const remove = (index: number) => {
    focus.current = { index: Math.min(index, images.length - 2), act: 'Remove' };
    setSaid(`Image ${index + 1} is removed.`);
    setProblems([]);
    change(
      images.filter((_, i) => i !== index),
      weights()?.filter((_, i) => i !== index),
    );
  };
  const full = images.length >= limit;
  const given = limit ? `${images.length} of at most ${limit}` : `${images.length}, this model takes none`;
  return (
    <Section
      title="Reference images"
      note={lacking > 0 ? `${lacking} of ${expected().length} missing` : given}
      paths={[FIELD, WEIGHTS, EXPECTED]}
      open={images.length > 0 || lacking > 0}
    >
      <div
        class={`references${over ? ' over' : ''}`}
        ref={place}
        title={known.field('GenerationRequest', FIELD).description}
        onDrop={(event) => {
          event.preventDefault();
          event.stopPropagation();
          setOver(false);
          if (!event.dataTransfer?.types.includes(MOVED_TYPE)) void take(filesIn(event.dataTransfer));
        }}
        onDragOver={(event) => {
          event.preventDefault();
          event.stopPropagation();
          setOver(!event.dataTransfer?.types.includes(MOVED_TYPE));
        }}
        onDragLeave={() => setOver(false)}
        onPaste={(event) => {
          const files = filesIn(event.clipboardData);
          if (!files.length) return;
          event.preventDefault();
          event.stopPropagation();
          void take(files);
        }}
      >
        {images.length > 0 && (
          <ol ref={list} aria-label="Reference images, in order">
            {images.map((image, index) => (
              <One key={`${String(image)} ${index}`} index={index} count={images.length} move={move} remove={remove} />
            ))}
          </ol>
        )}
        <input
          ref={chooser}
          class="unseen"
          type="file"
          multiple
          accept="image/png,image/jpeg,image/webp,image/*"
          aria-label="Reference images: choose files"
          tabIndex={-1}
          data-image={FIELD}
          onChange={(event) => {
            const files = [...(event.currentTarget.files ?? [])].map((file) => ({ name: file.name, blob: file }));
            event.currentTarget.value = '';
            void take(files);
          }}
        />
        <button type="button" class="drop" disabled={full} onClick={() => chooser.current?.click()}>
          {full ? 'Remove one to add another' : 'Drop, paste or choose images'}
        </button>
        <span class="unseen" role="status">
          {said}
        </span>
        <div role="alert">
          {problems.length > 0 && (
            <ul class="errors">
              {problems.map((problem) => (
                <li key={problem}>{problem}</li>
              ))}
            </ul>
          )}
        </div>
        <Errors path={FIELD} />
        <div ref={weighed}>
          <Errors path={WEIGHTS} />
        </div>
        <Missing />
        <p class="note">
          Refer to them in the prompt as image 1, image 2 …, in this order. Without a start image, the prompt edits them.
        </p>
      </div>
    </Section>
  );
}
