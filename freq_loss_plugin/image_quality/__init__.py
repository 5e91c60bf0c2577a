"""What is missing or wrong in training images, and from which noise level on that no longer matters.

edges, spectrum, jpeg, noise    what an image shows of its blur, its compression and its noise
measurement                     one image file
defects                         the same defects, made on a good image
dead_leaves                     synthetic good images
restoration                     latents of images with a defect, brought close to those of good ones, and what remains
survey                          all images of a run
"""
