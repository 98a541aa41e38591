"""Files of CIFAR-10 in both published forms, of any number of images."""

import pickle

import numpy as np

RNG = np.random.default_rng(0)


def write_binary(folder, planes):
  for i, batch in enumerate(planes, 1):
    labels = RNG.integers(0, 10, (len(batch), 1), np.uint8)
    rows = np.concatenate([labels, batch.reshape(len(batch), -1)], axis=1)
    (folder / f'data_batch_{i}.bin').write_bytes(rows.tobytes())


def python2_pickle(rows):
  """Pickles as Python 2 did: strings of bytes, old module names."""
  short = lambda text: b'U' + bytes([len(text)]) + text
  content = rows.tobytes()
  dtype = (b'cnumpy\ndtype\n' + short(b'u1') + b'K\x00K\x01\x87R'
           + b'(K\x03' + short(b'|') + b'NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xff'
           + b'K\x00tb')
  shape = b'M' + len(rows).to_bytes(2, 'little') + b'M\x00\x0c\x86'
  array = (b'cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n'
           + b'K\x00\x85' + short(b'b') + b'\x87R(K\x01' + shape + dtype
           + b'\x89T' + len(content).to_bytes(4, 'little') + content + b'tb')
  return (b'\x80\x02}(' + short(b'batch_label') + short(b'batch 1 of 5')
          + short(b'data') + array + short(b'labels') + b']u.')


def write_python2(folder, planes):
  for i, batch in enumerate(planes, 1):
    (folder / f'data_batch_{i}').write_bytes(
        python2_pickle(batch.reshape(len(batch), -1)))


def write_python3(folder, planes):
  for i, batch in enumerate(planes, 1):
    (folder / f'data_batch_{i}').write_bytes(pickle.dumps({
        b'data': batch.reshape(len(batch), -1), b'labels': [0] * len(batch)}))
