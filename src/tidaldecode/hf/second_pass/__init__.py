"""Decoded tokens run again with full attention: cache correction and lossless decoding."""
