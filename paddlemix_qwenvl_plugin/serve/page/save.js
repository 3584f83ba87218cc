/** Download of a generated file. */

export function saveFile(blob, name) {
  const link = document.createElement('a');
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  // The browser reads the data after the click: revoke the URL later.
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}
