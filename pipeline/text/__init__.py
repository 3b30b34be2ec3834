"""Text in: datasets as resumable streams of documents, packed into contexts of one length."""
