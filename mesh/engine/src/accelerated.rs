//! Faster ciphers where the CPU has AVX-512 with IFMA and VAES: the Intel Multi-Buffer Crypto library.
//!
//! For 1,420 bytes on the machine of docs/PERFORMANCE.md: ChaCha20-Poly1305, for which AWS-LC has AVX2 code, 370 ns instead of
//! 700; AES-256-GCM, whose powers of the hash key AWS-LC computes for each packet, 121 instead of 162 ns to seal and 113 instead
//! of 169 to open. What it makes is compared with AWS-LC's when a thread first asks for it; a difference turns it off for
//! the process.

#[cfg(ipsec_mb)]
mod imb {
    use std::cell::OnceCell;
    use std::ffi::c_void;
    use std::ptr::NonNull;
    use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
    use std::sync::OnceLock;

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
        fn retinue_imb_gcm_schedule(manager: *mut c_void, key: *const u8) -> *mut c_void;
        fn retinue_imb_gcm_forget(schedule: *mut c_void);
        fn retinue_imb_gcm(
            manager: *const c_void,
            opening: i32,
            schedule: *const c_void,
            nonce: *const u8,
            ad: *const u8,
            ad_length: usize,
            src: *const u8,
            dst: *mut u8,
            length: usize,
            tag: *mut u8,
        );
    }

    /// Lengths around every size of block that either cipher works by.
    const COMPARED: [usize; 20] =
        [0, 1, 15, 16, 17, 255, 256, 257, 511, 512, 513, 767, 769, 1023, 1024, 1025, 1408, 1420, 1472, 2047];
    /// Of ChaCha20-Poly1305, shorter packets gain nothing.
    const SHORTEST: usize = 256;
    /// Once off, for the rest of the process.
    static OFF: AtomicBool = AtomicBool::new(false);

    /// The library's state of one thread.
    struct Lane(NonNull<c_void>);

    impl Lane {
        /// None where the CPU or the library does not do, or the two libraries disagree.
        fn new() -> Option<Self> {
            if OFF.load(Relaxed) {
                return None;
            }
            // SAFETY: allocates and returns a manager or null.
            let lane = NonNull::new(unsafe { retinue_imb_new() }).map(Self).filter(Self::agrees);
            if lane.is_none() {
                turn_off();
            }
            lane
        }

        /// ChaCha20-Poly1305 as AWS-LC's.
        fn agrees(&self) -> bool {
            let key = compared_key();
            compare(
                Cipher::ChaCha20Poly1305,
                &key,
                SHORTEST,
                |nonce, plain, out| self.seal(&key, nonce, b"", plain, out),
                |nonce, data| self.open(&key, nonce, b"", data),
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
            Some(judge(done, body, sent, &mut tag))
        }
    }

    impl Drop for Lane {
        fn drop(&mut self) {
            // SAFETY: made by retinue_imb_new, freed once.
            unsafe { retinue_imb_free(self.0.as_ptr()) }
        }
    }

    /// The text's length, if it was `done` and `tag` is what was sent.
    fn judge(done: bool, text: &mut [u8], sent: &[u8], tag: &mut [u8; TAG_LEN]) -> Result<usize, Forged> {
        assert!(sent.len() == TAG_LEN);
        // SAFETY: both are 16 bytes.
        let same = unsafe { lc::CRYPTO_memcmp(tag.as_ptr().cast(), sent.as_ptr().cast(), TAG_LEN) == 0 };
        tag.zeroize();
        if done && same {
            return Ok(text.len());
        }
        text.zeroize(); // nobody reads what nobody vouches for
        Err(Forged)
    }

    fn compared_key() -> Key {
        std::array::from_fn(|i| i as u8 ^ 0x5a)
    }

    /// Both libraries: the same bytes, and a changed one noticed.
    fn compare(
        cipher: Cipher,
        key: &Key,
        shortest: usize,
        seal: impl Fn(&[u8; 12], &[u8], &mut [u8]) -> Option<usize>,
        open: impl Fn(&[u8; 12], &mut [u8]) -> Option<Result<usize, Forged>>,
    ) -> bool {
        let plain: Vec<u8> = (0..2048u32).map(|i| (i * 7 % 251) as u8).collect();
        let reference = Aead::plain(cipher, key);
        COMPARED.into_iter().filter(|length| *length >= shortest).all(|length| {
            let counter = (length as u64) << 32 | 9;
            let nonce = crate::crypto::nonce(counter);
            let mut theirs = vec![0; length + TAG_LEN];
            let mut ours = theirs.clone();
            reference.seal(counter, b"", &plain[..length], &mut theirs);
            if seal(&nonce, &plain[..length], &mut ours).is_none() || ours != theirs {
                return false;
            }
            ours[length / 2] ^= 1;
            open(&nonce, &mut ours) == Some(Err(Forged))
                && open(&nonce, &mut theirs) == Some(Ok(length))
                && theirs[..length] == plain[..length]
        })
    }

    /// A manager of which only the table of functions is read.
    struct Table(Lane);

    // SAFETY: `retinue_imb_gcm` and `retinue_imb_gcm_schedule` read function pointers, which nobody writes after
    // `retinue_imb_new`; nothing else is called with it before it is dropped, which a static never is.
    unsafe impl Send for Table {}
    // SAFETY: as above.
    unsafe impl Sync for Table {}

    /// AES-256-GCM of one key: its round keys and powers of its hash key, wiped when dropped.
    pub struct Gcm {
        table: &'static Table,
        schedule: NonNull<c_void>,
    }

    // SAFETY: the schedule is only read after it was made.
    unsafe impl Send for Gcm {}
    // SAFETY: as above.
    unsafe impl Sync for Gcm {}

    impl Gcm {
        /// None: the caller's own library has to do it.
        pub fn new(key: &Key) -> Option<Self> {
            static TABLE: OnceLock<Option<Table>> = OnceLock::new();
            static AGREES: OnceLock<bool> = OnceLock::new();
            if OFF.load(Relaxed) {
                return None;
            }
            let table = TABLE.get_or_init(|| Lane::new().map(Table)).as_ref()?;
            if !*AGREES.get_or_init(|| Self::with(table, &compared_key()).is_some_and(|one| one.agrees())) {
                turn_off();
                return None;
            }
            Self::with(table, key)
        }

        fn with(table: &'static Table, key: &Key) -> Option<Self> {
            // SAFETY: the key is 32 bytes; returns memory of its own, or null without any.
            let schedule = unsafe { retinue_imb_gcm_schedule(table.0 .0.as_ptr(), key.as_ptr()) };
            NonNull::new(schedule).map(|schedule| Self { table, schedule })
        }

        fn agrees(&self) -> bool {
            compare(
                Cipher::Aes256Gcm,
                &compared_key(),
                0,
                |nonce, plain, out| Some(self.seal(nonce, b"", plain, out)),
                |nonce, data| Some(self.open(nonce, b"", data)),
            )
        }

        /// # Safety
        /// `src` is readable and `dst` writable for `length` bytes; they are equal or do not overlap.
        #[inline]
        unsafe fn run(
            &self,
            opening: bool,
            (nonce, ad): (&[u8; 12], &[u8]),
            src: *const u8,
            dst: *mut u8,
            length: usize,
            tag: &mut [u8; TAG_LEN],
        ) {
            // SAFETY: what the caller promises of `src` and `dst`; the others are whole.
            unsafe {
                retinue_imb_gcm(
                    self.table.0 .0.as_ptr(),
                    i32::from(opening),
                    self.schedule.as_ptr(),
                    nonce.as_ptr(),
                    ad.as_ptr(),
                    ad.len(),
                    src,
                    dst,
                    length,
                    tag.as_mut_ptr(),
                );
            }
        }

        /// As `Aead::seal`.
        #[inline]
        pub fn seal(&self, nonce: &[u8; 12], ad: &[u8], plain: &[u8], out: &mut [u8]) -> usize {
            let (body, rest) = out.split_at_mut(plain.len());
            let tag = rest.first_chunk_mut().expect("room for the tag");
            // SAFETY: two slices of one length, one of them borrowed mutably.
            unsafe { self.run(false, (nonce, ad), plain.as_ptr(), body.as_mut_ptr(), plain.len(), tag) };
            plain.len() + TAG_LEN
        }

        /// As `Aead::open`.
        #[inline]
        pub fn open(&self, nonce: &[u8; 12], ad: &[u8], data: &mut [u8]) -> Result<usize, Forged> {
            let Some(length) = data.len().checked_sub(TAG_LEN) else { return Err(Forged) };
            let (body, sent) = data.split_at_mut(length);
            // Not what was sent: a library that wrote nothing would have vouched for nothing.
            let mut tag: [u8; TAG_LEN] = std::array::from_fn(|i| !sent[i]);
            let text = body.as_mut_ptr();
            // SAFETY: in place, which the library allows.
            unsafe { self.run(true, (nonce, ad), text, text, length, &mut tag) };
            judge(true, body, sent, &mut tag)
        }
    }

    impl Drop for Gcm {
        fn drop(&mut self) {
            // SAFETY: made by retinue_imb_gcm_schedule, forgotten once.
            unsafe { retinue_imb_gcm_forget(self.schedule.as_ptr()) }
        }
    }

    thread_local! {
        static LANE: OnceCell<Option<Lane>> = const { OnceCell::new() };
    }

    fn with<T>(length: usize, run: impl FnOnce(&Lane) -> Option<T>) -> Option<T> {
        if length < SHORTEST || OFF.load(Relaxed) {
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
        OFF.store(true, Relaxed);
    }

    /// Does it seal for this thread? The first question of a process is the self-test.
    pub fn usable() -> bool {
        Gcm::new(&compared_key()).is_some() && with(SHORTEST, |_| Some(())).is_some()
    }
}

#[cfg(ipsec_mb)]
pub use imb::{open, seal, turn_off, usable, Gcm};

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

    /// There is none.
    pub enum Gcm {}

    impl Gcm {
        pub fn new(_: &Key) -> Option<Self> {
            None
        }

        pub fn seal(&self, _: &[u8; 12], _: &[u8], _: &[u8], _: &mut [u8]) -> usize {
            match *self {}
        }

        pub fn open(&self, _: &[u8; 12], _: &[u8], _: &mut [u8]) -> Result<usize, Forged> {
            match *self {}
        }
    }

    pub fn turn_off() {}

    pub fn usable() -> bool {
        false
    }
}

#[cfg(not(ipsec_mb))]
pub use absent::{open, seal, turn_off, usable, Gcm};
