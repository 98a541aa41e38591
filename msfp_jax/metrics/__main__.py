"""Prints README's glossary: python -m msfp_jax.metrics."""

from msfp_jax.metrics import glossary

if __name__ == '__main__':
  print(glossary.columns(), glossary.networks(), sep='\n\n')
