"""What is missing or wrong in training images, and from which noise level on that no longer matters.

edges, spectrum, jpeg, noise    what an image shows of its blur, its compression and its noise
measurement                     one image file
defects                         the same defects, made on a good image
detectability                   at which noise levels a defect is drowned
survey                          all images of a run
"""
