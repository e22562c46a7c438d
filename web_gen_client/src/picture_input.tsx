/** A picture for the request: dropped, pasted, chosen, or dragged from the gallery. */
import { useRef, useState } from 'preact/hooks';
import { Errors, usePlace } from './fields';
import { addPicture, pictureAt, reference } from './pictures';
import { edit, itemAt, value } from './state';
import type { ComponentChildren } from 'preact';

export const ITEM_TYPE = 'application/x-gallery-item';

/** The picture in what was dropped or pasted. */
export function blobIn(data: DataTransfer | null): Blob | undefined {
  const item = data && itemAt(data.getData(ITEM_TYPE));
  return item?.blob ?? [...(data?.files ?? [])].find((file) => file.type.startsWith('image/'));
}

interface PictureInputProps {
  path: string;
  title: string;
  description: string;
  /** Further buttons, once there is a picture */
  actions?: ComponentChildren;
  /** In place of the picture itself, a second one beside it */
  beside?: ComponentChildren;
}

export function PictureInput({ path, title, description, actions, beside }: PictureInputProps) {
  const place = usePlace(path);
  const chooser = useRef<HTMLInputElement>(null);
  const [problem, setProblem] = useState('');
  const [over, setOver] = useState(false);
  const picture = pictureAt(value(path));

  const take = async (blob: Blob | undefined) => {
    if (!blob) return setProblem('There is no picture in this.');
    try {
      setProblem('');
      edit(path, reference(await addPicture(blob)));
    } catch (error) {
      setProblem(error instanceof Error ? error.message : String(error));
    }
  };
  const drop = (event: DragEvent) => {
    event.preventDefault();
    event.stopPropagation();
    setOver(false);
    void take(blobIn(event.dataTransfer));
  };
  const paste = (event: ClipboardEvent) => {
    if (!blobIn(event.clipboardData)) return;
    event.preventDefault();
    event.stopPropagation();
    void take(blobIn(event.clipboardData));
  };
  const size = picture && `${picture.width} × ${picture.height}`;
  return (
    <div class="field wide" ref={place} title={description}>
      <div class="label-row"><span class="label">{title}</span>{size && <span class="note">{size}</span>}</div>
      <div class={`picture${over ? ' over' : ''}${picture ? ' filled' : ''}`} onDrop={drop} onDragOver={(event) => (event.preventDefault(), event.stopPropagation(), setOver(true))} onDragLeave={() => setOver(false)} onPaste={paste}>
        <input ref={chooser} class="unseen" type="file" accept="image/png,image/jpeg,image/webp,image/*" aria-label={`${title}: choose a file`} tabIndex={-1} data-picture={path}
          onChange={(event) => (void take(event.currentTarget.files?.[0]), (event.currentTarget.value = ''))} />
        {picture ? (
          <>
            <img src={picture.dataUri} alt={`${title}, ${size}`} />
            {beside}
          </>
        ) : (
          <button type="button" class="drop" onClick={() => chooser.current?.click()} aria-label={`${title}: choose, drop or paste a picture`}>Drop, paste or <u>choose</u></button>
        )}
      </div>
      {picture && (
        <div class="actions">
          <button type="button" onClick={() => chooser.current?.click()} aria-label={`Replace ${title}`}>Replace</button>
          {actions}
          <button type="button" onClick={() => edit(path, undefined)} aria-label={`Remove ${title}`}>Remove</button>
        </div>
      )}
      {problem && <ul class="errors" role="alert"><li>{problem}</li></ul>}
      <Errors path={path} />
    </div>
  );
}
