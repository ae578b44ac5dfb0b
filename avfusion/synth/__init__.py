"""A world of our own with ground truth: procedural audio-visual clips, written as the public data sets are.

    avfusion synth OUT --layout vggsound --clips 200 --seed 0 --task conjunction

`scene` draws what happens in a clip, `looks` and `timbres` are what its objects look and sound like, `render` makes
frames, masks and waveforms of it, `layouts` puts them into the files of a public data set, `command` runs all of that
in parallel. Every clip is a pure function of the settings and its index.
"""
