"""The trainer of word embeddings: texts, the skip-gram model, and the files that a training writes."""
