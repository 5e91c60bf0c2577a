"""The guidance token: CLIP features of the training images, their files, and their extraction."""
