"""One engine for image-classification training strategies; see docs/ and the README."""
