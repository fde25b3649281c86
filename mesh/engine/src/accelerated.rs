//! A faster ChaCha20-Poly1305 for long packets, where the CPU has AVX-512 with IFMA: the Intel Multi-Buffer Crypto library.
//!
//! AWS-LC's is AVX2 code: 700 ns for 1,420 bytes on the machine of docs/PERFORMANCE.md, against 370 here. What it makes is
//! compared with AWS-LC's when a thread first asks for it (`Lane::new`); a difference turns it off for the process.

#[cfg(ipsec_mb)]
mod imb {
    use std::cell::OnceCell;
    use std::ffi::c_void;
    use std::ptr::NonNull;
    use std::sync::atomic::{AtomicU8, Ordering::Relaxed};

    use aws_lc_sys as lc;
    use zeroize::Zeroize;

    use crate::crypto::{Aead, Cipher, Forged, Key, TAG_LEN};

    extern "C" {
        fn retinue_imb_new() -> *mut c_void;
        fn retinue_imb_free(manager: *mut c_void);
        fn retinue_imb_chacha20poly1305(
            manager: *mut c_void,
            opening: i32,
            key: *const u8,
            nonce: *const u8,
            ad: *const u8,
            ad_length: usize,
            src: *const u8,
            dst: *mut u8,
            length: usize,
            tag: *mut u8,
        ) -> i32;
    }

    /// Shorter packets gain nothing.
    const SHORTEST: usize = 256;
    const UNKNOWN: u8 = 0;
    const ON: u8 = 1;
    const OFF: u8 = 2;
    static STATE: AtomicU8 = AtomicU8::new(UNKNOWN);

    /// The library's state of one thread.
    struct Lane(NonNull<c_void>);

    impl Lane {
        /// None where the CPU or the library does not do, or the two libraries disagree.
        fn new() -> Option<Self> {
            if STATE.load(Relaxed) == OFF {
                return None;
            }
            // SAFETY: allocates and returns a manager or null.
            let lane = NonNull::new(unsafe { retinue_imb_new() }).map(Self).filter(Self::agrees);
            STATE.store(if lane.is_some() { ON } else { OFF }, Relaxed);
            lane
        }

        /// Both libraries over lengths around every block size: the same bytes, and a changed one noticed.
        fn agrees(&self) -> bool {
            let key: Key = std::array::from_fn(|i| i as u8 ^ 0x5a);
            let plain: Vec<u8> = (0..2048u32).map(|i| (i * 7 % 251) as u8).collect();
            let reference = Aead::plain(Cipher::ChaCha20Poly1305, &key);
            [256, 257, 511, 512, 513, 1023, 1024, 1025, 1408, 1420, 1440, 1472, 2047].into_iter().all(
                |length| {
                    let counter = (length as u64) << 32 | 9;
                    let mut theirs = vec![0; length + TAG_LEN];
                    let mut ours = theirs.clone();
                    reference.seal(counter, b"", &plain[..length], &mut theirs);
                    let sealed =
                        self.seal(&key, &crate::crypto::nonce(counter), b"", &plain[..length], &mut ours);
                    if sealed.is_none() || ours != theirs {
                        return false;
                    }
                    ours[length / 2] ^= 1;
                    let refused = self.open(&key, &crate::crypto::nonce(counter), b"", &mut ours);
                    let opened = self.open(&key, &crate::crypto::nonce(counter), b"", &mut theirs);
                    refused == Some(Err(Forged))
                        && opened == Some(Ok(length))
                        && theirs[..length] == plain[..length]
                },
            )
        }

        /// The library's verdict; `tag` is written, not compared.
        ///
        /// # Safety
        /// `src` is readable and `dst` writable for `length` bytes; they are equal or do not overlap.
        unsafe fn run(
            &self,
            opening: bool,
            (key, nonce, ad): (&Key, &[u8; 12], &[u8]),
            src: *const u8,
            dst: *mut u8,
            length: usize,
            tag: &mut [u8; TAG_LEN],
        ) -> bool {
            // SAFETY: what the caller promises of `src` and `dst`; the others are whole; the manager is this thread's own.
            let done = unsafe {
                retinue_imb_chacha20poly1305(
                    self.0.as_ptr(),
                    i32::from(opening),
                    key.as_ptr(),
                    nonce.as_ptr(),
                    ad.as_ptr(),
                    ad.len(),
                    src,
                    dst,
                    length,
                    tag.as_mut_ptr(),
                )
            };
            done == 1
        }

        fn seal(
            &self,
            key: &Key,
            nonce: &[u8; 12],
            ad: &[u8],
            plain: &[u8],
            out: &mut [u8],
        ) -> Option<usize> {
            assert!(!plain.is_empty());
            let (body, rest) = out.split_at_mut(plain.len());
            let tag = rest.first_chunk_mut().expect("room for the tag");
            // SAFETY: two slices of one length, one of them borrowed mutably.
            let done = unsafe {
                self.run(false, (key, nonce, ad), plain.as_ptr(), body.as_mut_ptr(), plain.len(), tag)
            };
            done.then_some(plain.len() + TAG_LEN)
        }

        fn open(
            &self,
            key: &Key,
            nonce: &[u8; 12],
            ad: &[u8],
            data: &mut [u8],
        ) -> Option<Result<usize, Forged>> {
            assert!(data.len() > TAG_LEN);
            let (body, sent) = data.split_at_mut(data.len() - TAG_LEN);
            let mut tag = [0u8; TAG_LEN];
            let text = body.as_mut_ptr();
            // SAFETY: in place, which the library allows.
            let done = unsafe { self.run(true, (key, nonce, ad), text, text, body.len(), &mut tag) };
            // SAFETY: both are 16 bytes.
            let same = unsafe { lc::CRYPTO_memcmp(tag.as_ptr().cast(), sent.as_ptr().cast(), TAG_LEN) == 0 };
            tag.zeroize();
            if done && same {
                return Some(Ok(body.len()));
            }
            body.zeroize(); // nobody reads what nobody vouches for
            Some(Err(Forged))
        }
    }

    impl Drop for Lane {
        fn drop(&mut self) {
            // SAFETY: made by retinue_imb_new, freed once.
            unsafe { retinue_imb_free(self.0.as_ptr()) }
        }
    }

    thread_local! {
        static LANE: OnceCell<Option<Lane>> = const { OnceCell::new() };
    }

    fn with<T>(length: usize, run: impl FnOnce(&Lane) -> Option<T>) -> Option<T> {
        if length < SHORTEST || STATE.load(Relaxed) == OFF {
            return None;
        }
        LANE.try_with(|lane| lane.get_or_init(Lane::new).as_ref().and_then(run)).ok().flatten()
    }

    /// Bytes written, or None: the caller's own library has to do it.
    #[inline]
    pub fn seal(key: &Key, nonce: &[u8; 12], ad: &[u8], plain: &[u8], out: &mut [u8]) -> Option<usize> {
        with(plain.len(), |lane| lane.seal(key, nonce, ad, plain, out))
    }

    /// As `Aead::open`, or None: the caller's own library has to do it.
    #[inline]
    pub fn open(key: &Key, nonce: &[u8; 12], ad: &[u8], data: &mut [u8]) -> Option<Result<usize, Forged>> {
        with(data.len().saturating_sub(TAG_LEN), |lane| lane.open(key, nonce, ad, data))
    }

    /// Never, in this process (`--no-avx512`).
    pub fn turn_off() {
        STATE.store(OFF, Relaxed);
    }

    /// Does it seal for this thread? The first question of a process is the self-test.
    pub fn usable() -> bool {
        with(SHORTEST, |_| Some(())).is_some()
    }
}

#[cfg(ipsec_mb)]
pub use imb::{open, seal, turn_off, usable};

#[cfg(not(ipsec_mb))]
mod absent {
    use crate::crypto::{Forged, Key};

    #[inline]
    pub fn seal(_: &Key, _: &[u8; 12], _: &[u8], _: &[u8], _: &mut [u8]) -> Option<usize> {
        None
    }

    #[inline]
    pub fn open(_: &Key, _: &[u8; 12], _: &[u8], _: &mut [u8]) -> Option<Result<usize, Forged>> {
        None
    }

    pub fn turn_off() {}

    pub fn usable() -> bool {
        false
    }
}

#[cfg(not(ipsec_mb))]
pub use absent::{open, seal, turn_off, usable};

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crypto::{nonce, Aead, Cipher, Forged, TAG_LEN};

    /// Every length of a packet, with and without data beside it: AWS-LC opens what this seals, and the other way round.
    #[test]
    fn both_libraries_speak_the_same() {
        let key = std::array::from_fn(|i| (i * 37) as u8);
        let reference = Aead::plain(Cipher::ChaCha20Poly1305, &key);
        let plain: Vec<u8> = (0..1600u32).map(|i| (i * i % 253) as u8).collect();
        let mut tried = 0;
        for length in (1..600).chain((600..1600).step_by(13)) {
            for ad in [&b""[..], b"some data beside it"] {
                let counter = (length as u64) << 40 | length as u64;
                let mut out = vec![0; length + TAG_LEN];
                let Some(written) = seal(&key, &nonce(counter), ad, &plain[..length], &mut out) else {
                    assert!(length < 256 || !usable());
                    continue;
                };
                tried += 1;
                assert_eq!(written, length + TAG_LEN);
                let mut copy = out.clone();
                assert_eq!(reference.open(counter, ad, &mut copy), Ok(length));
                assert_eq!(&copy[..length], &plain[..length]);
                assert_eq!(open(&key, &nonce(counter), ad, &mut out.clone()), Some(Ok(length)));
                assert_eq!(open(&key, &nonce(counter + 1), ad, &mut out.clone()), Some(Err(Forged)));
                assert_eq!(open(&key, &nonce(counter), b"other", &mut out.clone()), Some(Err(Forged)));
            }
        }
        assert!(tried > 800 || !usable(), "{tried}");
    }

    /// Any one bit of text or tag: refused, and nothing of the text is left.
    #[test]
    fn a_changed_bit_is_refused_and_leaves_nothing() {
        let key = [9; 32];
        let mut sealed = vec![0; 400 + TAG_LEN];
        if seal(&key, &nonce(1), b"", &[0xaa; 400], &mut sealed).is_none() {
            assert!(!usable());
            return;
        }
        for bit in 0..sealed.len() * 8 {
            let mut bad = sealed.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(open(&key, &nonce(1), b"", &mut bad), Some(Err(Forged)), "bit {bit}");
            assert_eq!(bad[..400], [0; 400]);
        }
    }

    #[test]
    fn threads_have_managers_of_their_own() {
        let key = [3; 32];
        let expected = {
            let mut out = vec![0; 1400 + TAG_LEN];
            Aead::plain(Cipher::ChaCha20Poly1305, &key).seal(5, b"", &[1; 1400], &mut out);
            out
        };
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..500 {
                        let mut out = vec![0; 1400 + TAG_LEN];
                        if seal(&key, &nonce(5), b"", &[1; 1400], &mut out).is_some() {
                            assert_eq!(out, expected);
                        }
                    }
                });
            }
        });
    }
}
