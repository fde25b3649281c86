//! Sliding window of received counters (RFC 6479), 8192 bits, without per-packet shifting.

const WORDS: usize = 128;
/// How far behind the newest counter a packet may still arrive.
pub const WINDOW: u64 = ((WORDS - 1) * 64) as u64;

/// Replay state of one receiving session.
pub struct Replay {
    /// One more than the greatest counter accepted; 0 when none was.
    next: u64,
    bits: [u64; WORDS],
}

impl Default for Replay {
    fn default() -> Self {
        Self { next: 0, bits: [0; WORDS] }
    }
}

impl Replay {
    /// Everything, for a hand-over: the next counter, then the bits.
    pub fn words(&self) -> impl Iterator<Item = u64> + '_ {
        std::iter::once(self.next).chain(self.bits)
    }

    /// The opposite of [`Replay::words`].
    pub fn from_words(mut word: impl FnMut() -> Option<u64>) -> Option<Self> {
        let mut r = Self { next: word()?, ..Self::default() };
        for b in &mut r.bits {
            *b = word()?;
        }
        Some(r)
    }

    /// Accepts `counter` once. The caller has authenticated the packet and bounded the counter.
    pub fn accept(&mut self, counter: u64) -> bool {
        let word = (counter >> 6) as usize;
        if counter >= self.next {
            let newest = self.next.saturating_sub(1) >> 6;
            let ahead = ((counter >> 6) - newest).min(WORDS as u64);
            for i in 1..=ahead {
                self.bits[(newest + i) as usize % WORDS] = 0;
            }
            self.next = counter + 1;
        } else if self.next - 1 - counter > WINDOW {
            return false;
        }
        let bit = 1u64 << (counter & 63);
        let slot = &mut self.bits[word % WORDS];
        if *slot & bit != 0 {
            return false;
        }
        *slot |= bit;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table() {
        let w = WINDOW;
        // (sequence of (counter, accepted))
        let cases: &[&[(u64, bool)]] = &[
            &[(0, true), (0, false), (1, true), (1, false), (9, true), (8, true), (7, true), (7, false)],
            &[(w, true), (w - 1, true), (w - 1, false), (0, true), (0, false)],
            &[(w + 1, true), (0, false), (1, true), (1, false), (w + 1, false)],
            &[(w + 64, true), (0, false), (63, false), (64, true)],
            &[(5, true), (1 << 40, true), (5, false), ((1 << 40) - w, true), ((1 << 40) - w - 1, false)],
            &[(u64::MAX - (1 << 13) - 2, true), (0, false), (u64::MAX - (1 << 13) - 2, false)],
            &[(64, true), (63, true), (128, true), (127, true), (65, true), (63, false), (65, false)],
        ];
        for case in cases {
            let mut r = Replay::default();
            for (i, (c, want)) in case.iter().enumerate() {
                assert_eq!(r.accept(*c), *want, "step {i} counter {c} of {case:?}");
            }
        }
    }

    #[test]
    fn agrees_with_a_set() {
        let mut seed = 1u64;
        let mut rnd = move || {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            seed >> 33
        };
        for _ in 0..20 {
            let mut r = Replay::default();
            let mut seen = std::collections::HashSet::new();
            let mut top = 0u64;
            for _ in 0..20_000 {
                let jump = if rnd() % 500 == 0 { rnd() % 20_000 } else { rnd() % 40 };
                let c = (top + jump).saturating_sub(rnd() % 9000);
                let too_old = !seen.is_empty() && c < top && top - c > WINDOW;
                let want = !too_old && !seen.contains(&c);
                assert_eq!(r.accept(c), want, "counter {c} top {top}");
                if want {
                    seen.insert(c);
                    top = top.max(c);
                }
            }
        }
    }
}
