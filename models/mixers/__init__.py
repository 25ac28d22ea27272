"""Token mixers: RankMixer, TokenMixer-Large, and UG-Sep on both."""
