/** Entry point of the page: sends questions and shows answers. */

import { answer, ServerError } from './api.js';
import { announce, announceEnd } from './announce.js';
import { plainText } from './answer_text.js';
import { startCamera } from './camera.js';
import { copyText } from './clipboard.js';
import { Composer } from './composer.js';
import { Conversation } from './conversation.js';
import { byId, element } from './dom.js';
import { handleDropAndPaste } from './drop.js';
import { openKeyDialog, startKeyDialog } from './key_dialog.js';
import { setWords, startLanguage, textOf } from './language.js';
import { closeNotice, notice } from './notice.js';
import { saveFile } from './save.js';
import { keepEndInView, scrollToEnd } from './scroll.js';
import { ServerStatus } from './server_status.js';
import { TurnView } from './turn_view.js';

let conversation = new Conversation();
let views = new Map(); // from turns to their TurnView
let running = null; // AbortController of the running answer
let editing = null; // { turn, draft } while a question is edited; draft: the composer's content before the edit

const status = new ServerStatus(openKeyDialog);
const composer = new Composer({ send, stop });

function send(question) {
  if (editing) removeFrom(editing.turn);
  endEdit();
  const turn = conversation.add(question);
  const number = conversation.turns.length;
  const view = new TurnView(turn, number, conversation.imagesUpTo(turn), {
    edit: () => edit(turn),
    retry: () => run(turn),
    copy: () => copyText(plainText(turn.answer.text), view.copy),
    key: openKeyDialog,
  });
  views.set(turn, view);
  byId('turns').append(view.node);
  run(turn);
  scrollToEnd();
}

/** Request a turn's answer and show it as it is streamed. */
async function run(turn) {
  if (running) return;
  const abort = new AbortController();
  running = abort;
  conversation.restart(turn);
  composer.setRunning(true);
  showAll();
  announce(textOf('answering'));
  const startTime = performance.now();
  const result = turn.answer;
  let frame = 0;
  try {
    const model = await status.findModel();
    for await (const delta of answer(model, conversation.messagesFor(turn), abort.signal)) {
      result.text += delta.text;
      result.finish = delta.finish ?? result.finish;
      result.usage = delta.usage ?? result.usage;
      // At most one update of the page for each frame of the display.
      frame ||= requestAnimationFrame(() => {
        frame = 0;
        keepEndInView(() => views.get(turn)?.update());
      });
    }
    result.state = 'done';
  } catch (error) {
    result.state = abort.signal.aborted ? 'stopped' : 'failed';
    if (!abort.signal.aborted) fail(result, error);
  }
  cancelAnimationFrame(frame);
  result.seconds = (performance.now() - startTime) / 1000;
  if (running === abort) running = null; // after `stop`, the next answer may be running already
  composer.setRunning(running !== null);
  keepEndInView(showAll);
  announceEnd(result);
}

/** Store the error in the answer, query the server's state and model again, and ask for a missing or wrong API key. */
function fail(result, error) {
  result.error = error instanceof ServerError ? error : new ServerError('failed', { detail: String(error) });
  status.forgetModel();
  status.check();
  if (error.kind === 'key') openKeyDialog();
}

function stop() {
  running?.abort();
  running = null;
  composer.setRunning(false);
}

/** Put a turn's question into the composer; sending it replaces the turn and all later ones. */
function edit(turn) {
  stop();
  editing = { turn, draft: editing?.draft ?? composer.draft };
  composer.fill(turn.question);
  composer.focus();
  const number = conversation.turns.indexOf(turn) + 1;
  notice(['editing', { number }], { label: 'cancel', act: cancelEdit }, 'editing');
  showAll();
}

function cancelEdit() {
  composer.fill(editing.draft);
  endEdit();
  composer.focus();
}

function endEdit() {
  editing = null;
  closeNotice('editing');
  showAll();
}

/** Remove a turn and all later ones. */
function removeFrom(turn) {
  for (const removed of conversation.turns.splice(conversation.turns.indexOf(turn))) {
    views.get(removed).node.remove();
    views.delete(removed);
  }
}

/** Update the views of all turns and the buttons of the header. */
function showAll() {
  const { turns } = conversation;
  const firstReplaced = editing ? turns.indexOf(editing.turn) : turns.length;
  turns.forEach((turn, index) => {
    const view = views.get(turn);
    view.update(turn === turns.at(-1));
    view.node.classList.toggle('replaced', index >= firstReplaced);
  });
  byId('welcome').hidden = turns.length > 0;
  byId('export').disabled = !turns.length;
  byId('new').disabled = !turns.length;
}

function clear() {
  stop();
  const previous = { conversation, views };
  conversation = new Conversation();
  views = new Map();
  byId('turns').replaceChildren();
  endEdit();
  composer.focus();
  const undo = () => {
    ({ conversation, views } = previous);
    byId('turns').replaceChildren(...[...views.values()].map(({ node }) => node));
    showAll();
  };
  notice('cleared', { label: 'undo', act: undo });
}

function exportJson() {
  const text = JSON.stringify(conversation.exported(status.model), null, 1);
  const time = new Date().toISOString().slice(0, 16).replace(/\D/g, '-');
  saveFile(new Blob([text], { type: 'application/json' }), `qwenvl-${time}.json`);
}

function start() {
  for (const key of ['suggestion.describe', 'suggestion.boxes', 'suggestion.read']) {
    const fillComposer = () => {
      composer.fill({ ...composer.draft, text: textOf(key) });
      composer.focus();
    };
    byId('suggestions').append(element('li', {}, element('button', { type: 'button', text: key, onclick: fillComposer })));
  }
  setWords(byId('state'), 'text', 'state.unknown');
  startLanguage(byId('language'));
  startCamera((files) => composer.attach(files));
  handleDropAndPaste((files) => composer.attach(files));
  startKeyDialog(async () => {
    await status.check();
    const last = conversation.turns.at(-1);
    if (last?.answer.error?.kind === 'key') run(last);
  });
  byId('export').addEventListener('click', exportJson);
  byId('new').addEventListener('click', clear);
  addEventListener('keydown', (event) => {
    if (event.key !== 'Escape' || event.isComposing || document.querySelector('dialog[open]')) return;
    if (running) stop();
    else if (editing) cancelEdit();
  });
  if (!matchMedia('(pointer: coarse)').matches) composer.focus(); // on a phone this would open the keyboard
  status.check();
}

start();
