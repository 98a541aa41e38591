"""The version of this package."""

# A plain string: what builds a wheel reads it without importing anything.
VERSION = '0.1.0'
