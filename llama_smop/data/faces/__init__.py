"""From a video of people to mouth crops like those of the training: faces, landmarks, tracks, one warp a frame."""
