/** Entry point of the page: sends questions and shows answers. */

import { answer, ServerError } from './api.js';
import { announce, announceEnd } from './announce.js';
import { plainText } from './answer_text.js';
import { startCamera } from './camera.js';
import { copyText } from './clipboard.js';
import { Composer } from './composer.js';
import { Conversation } from './conversation.js';
import { byId, element } from './dom.js';
import { takeDroppedAndPasted } from './drop.js';
import { openKeyDialog, startKeyDialog } from './key_dialog.js';
import { say, setWords, startLanguage } from './language.js';
import { closeNotice, notice } from './notice.js';
import { saveFile } from './save.js';
import { following, scrollToEnd } from './scroll.js';
import { ServerStatus } from './server_status.js';
import { TurnView } from './turn_view.js';

let conversation = new Conversation();
let views = new Map();
let running = null; // AbortController of the running answer
let editing = null; // { turn, draft } while a question is edited

const status = new ServerStatus(openKeyDialog);
const composer = new Composer({ send, stop });

function send(question) {
  if (editing) dropFrom(editing.turn);
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
  announce(say('answering'));
  const start = performance.now();
  const result = turn.answer;
  let frame = 0;
  try {
    const model = await status.findModel();
    for await (const delta of answer(model, conversation.messagesFor(turn), abort.signal)) {
      result.text += delta.text;
      result.finish = delta.finish ?? result.finish;
      result.usage = delta.usage ?? result.usage;
      frame ||= requestAnimationFrame(() => {
        frame = 0;
        following(() => views.get(turn)?.update());
      });
    }
    result.state = 'done';
  } catch (error) {
    result.state = abort.signal.aborted ? 'stopped' : 'failed';
    if (!abort.signal.aborted) fail(result, error);
  }
  cancelAnimationFrame(frame);
  result.seconds = (performance.now() - start) / 1000;
  if (running === abort) running = null;
  composer.setRunning(running !== null);
  following(showAll);
  announceEnd(result);
}

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

function edit(turn) {
  stop();
  editing = { turn, draft: editing?.draft ?? composer.written };
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

function dropFrom(turn) {
  for (const dropped of conversation.turns.splice(conversation.turns.indexOf(turn))) {
    views.get(dropped).node.remove();
    views.delete(dropped);
  }
}

function showAll() {
  const { turns } = conversation;
  const from = editing ? turns.indexOf(editing.turn) : turns.length;
  turns.forEach((turn, index) => {
    const view = views.get(turn);
    view.update(turn === turns.at(-1));
    view.node.classList.toggle('replaced', index >= from);
  });
  byId('welcome').hidden = turns.length > 0;
  byId('export').disabled = !turns.length;
  byId('new').disabled = !turns.length;
}

function clear() {
  stop();
  const before = { conversation, views };
  conversation = new Conversation();
  views = new Map();
  byId('turns').replaceChildren();
  endEdit();
  composer.focus();
  const undo = () => {
    ({ conversation, views } = before);
    byId('turns').replaceChildren(...[...views.values()].map(({ node }) => node));
    showAll();
  };
  notice('cleared', { label: 'undo', act: undo });
}

function exportJson() {
  const text = JSON.stringify(conversation.exported(status.model), null, 1);
  const when = new Date().toISOString().slice(0, 16).replace(/\D/g, '-');
  saveFile(new Blob([text], { type: 'application/json' }), `qwenvl-${when}.json`);
}

function start() {
  for (const key of ['suggestion.describe', 'suggestion.boxes', 'suggestion.read']) {
    const take = () => {
      composer.fill({ ...composer.written, text: say(key) });
      composer.focus();
    };
    byId('suggestions').append(element('li', {}, element('button', { type: 'button', text: key, onclick: take })));
  }
  setWords(byId('state'), 'text', 'state.unknown');
  startLanguage(byId('language'));
  startCamera((files) => composer.attach(files));
  takeDroppedAndPasted((files) => composer.attach(files));
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
