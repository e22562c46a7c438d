/** An image for the request: dropped, pasted, chosen, or dragged from the gallery. */
import { useRef, useState } from 'preact/hooks';
import { touch } from './errors';
import { Errors, usePlace } from './fields';
import { addImage, imageAt, reference } from './images';
import { edit, itemAt, value } from './state';
import type { ComponentChildren } from 'preact';

export const ITEM_TYPE = 'application/x-gallery-item';

/** The image in a drop or paste. */
export function blobIn(data: DataTransfer | null): Blob | undefined {
  const item = data && itemAt(data.getData(ITEM_TYPE));
  return item?.blob ?? [...(data?.files ?? [])].find((file) => file.type.startsWith('image/'));
}

/** Why a drop contains no image. */
export function problemWith(data: DataTransfer | null): string {
  const [file] = data?.files ?? [];
  return file ? `${file.name} is not an image: drop a PNG, JPEG or WebP file.` : 'No image was dropped.';
}

interface ImageInputProps {
  path: string;
  title: string;
  description: string;
  /** Further buttons, once there is an image */
  actions?: ComponentChildren;
  /** A second image, shown beside the first */
  beside?: ComponentChildren;
}

export function ImageInput({ path, title, description, actions, beside }: ImageInputProps) {
  const place = usePlace(path);
  const chooser = useRef<HTMLInputElement>(null);
  const [problem, setProblem] = useState('');
  const [over, setOver] = useState(false);
  const image = imageAt(value(path));

  const take = async (blob: Blob | undefined, otherwise = '') => {
    if (!blob) return setProblem(otherwise);
    try {
      setProblem('');
      edit(path, reference(await addImage(blob)));
    } catch (error) {
      setProblem(error instanceof Error ? error.message : String(error));
    }
  };
  const drop = (event: DragEvent) => {
    event.preventDefault();
    event.stopPropagation();
    setOver(false);
    void take(blobIn(event.dataTransfer), problemWith(event.dataTransfer));
  };
  const paste = (event: ClipboardEvent) => {
    if (!blobIn(event.clipboardData)) return;
    event.preventDefault();
    event.stopPropagation();
    void take(blobIn(event.clipboardData));
  };
  const size = image && `${image.width} × ${image.height}`;
  return (
    <div class="field wide" ref={place} title={description} onFocusOut={() => touch(path)}>
      <div class="label-row">
        <span class="label">{title}</span>
        {size && <span class="note">{size}</span>}
      </div>
      <div
        class={`image-input${over ? ' over' : ''}${image ? ' filled' : ''}`}
        onDrop={drop}
        onDragOver={(event) => (event.preventDefault(), event.stopPropagation(), setOver(true))}
        onDragLeave={() => setOver(false)}
        onPaste={paste}
      >
        <input
          ref={chooser}
          class="unseen"
          type="file"
          accept="image/png,image/jpeg,image/webp,image/*"
          aria-label={`${title}: choose a file`}
          tabIndex={-1}
          data-image={path}
          onChange={(event) => (void take(event.currentTarget.files?.[0]), (event.currentTarget.value = ''))}
        />
        {image ? (
          <>
            <img src={image.dataUri} alt={`${title}, ${size}`} />
            {beside}
          </>
        ) : (
          <button type="button" class="drop" onClick={() => chooser.current?.click()}>
            <span class="unseen">{title}: </span>Drop, paste or <u>choose</u>
          </button>
        )}
      </div>
      {image && (
        <div class="actions">
          <button type="button" onClick={() => chooser.current?.click()} aria-label={`Replace ${title}`}>
            Replace
          </button>
          {actions}
          <button type="button" onClick={() => edit(path, undefined)} aria-label={`Remove ${title}`}>
            Remove
          </button>
        </div>
      )}
      {problem && (
        <p class="errors" role="alert">
          {problem}
        </p>
      )}
      <Errors path={path} />
    </div>
  );
}
