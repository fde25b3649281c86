//! Primitives: AEAD, X25519, BLAKE2s, HMAC and the WireGuard KDF, over AWS-LC and `blake2`.
//!
//! The only module that encrypts with AWS-LC; AES-256-GCM and long packets of ChaCha20-Poly1305 go to `accelerated` where
//! that is usable.
//! Nothing here knows a message format.

use std::ptr::NonNull;

use aws_lc_sys as lc;
use blake2::digest::consts::U16;
use blake2::digest::{FixedOutput, KeyInit, Mac, Update};
use blake2::{Blake2s256, Blake2sMac, Digest};
use zeroize::{Zeroize, Zeroizing};

use crate::accelerated::{self, Gcm};

/// Length of every AEAD tag used here, in bytes.
pub const TAG_LEN: usize = 16;
pub type Key = [u8; 32];
/// A key that stays where it is: moving the box leaves no copy behind, dropping it wipes the key.
pub type Secret = Box<Zeroizing<Key>>;

/// An all-zero key to be filled in place.
pub fn blank_secret() -> Secret {
    Box::new(Zeroizing::new([0; 32]))
}

/// Overwrites the stack below the caller: key material that moves and register spills left there.
#[inline(never)]
pub fn burn_stack() {
    let mut words = [0u64; 3072];
    std::hint::black_box(&mut words);
}

/// Transport cipher of a session; the handshake itself always uses ChaCha20-Poly1305.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Cipher {
    #[default]
    ChaCha20Poly1305,
    Aes256Gcm,
}

impl Cipher {
    pub fn name(self) -> &'static str {
        match self {
            Cipher::ChaCha20Poly1305 => "chacha20poly1305",
            Cipher::Aes256Gcm => "aes-256-gcm",
        }
    }

    pub fn parse(name: &str) -> Option<Self> {
        [Cipher::ChaCha20Poly1305, Cipher::Aes256Gcm].into_iter().find(|c| c.name() == name)
    }
}

/// Authentication failed; carries nothing, so nothing can leak.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Forged;

/// A keyed AEAD. The key schedule lives in an allocation of its library that is wiped when freed.
pub struct Aead {
    keyed: Keyed,
    /// What a session's was made of, for a hand-over to another process.
    made_of: Option<(Cipher, Secret)>,
}

enum Keyed {
    AwsLc(Context),
    Accelerated(Gcm),
}

struct Context(NonNull<lc::EVP_AEAD_CTX>);

// SAFETY: EVP_AEAD_CTX has no thread affinity, and the library documents seal and open on a
// const context as safe to call from several threads at once.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Aead {
    pub fn new(cipher: Cipher, key: &Key) -> Self {
        let mut kept = blank_secret();
        kept.copy_from_slice(key);
        let keyed = match cipher {
            Cipher::Aes256Gcm => Gcm::new(key).map(Keyed::Accelerated),
            Cipher::ChaCha20Poly1305 => None,
        };
        let keyed = keyed.unwrap_or_else(|| Keyed::AwsLc(Context::of(cipher, key)));
        Self { keyed, made_of: Some((cipher, kept)) }
    }

    /// By AWS-LC alone, whatever the CPU has.
    pub fn plain(cipher: Cipher, key: &Key) -> Self {
        Self { keyed: Keyed::AwsLc(Context::of(cipher, key)), made_of: None }
    }

    /// Cipher and key of a session's AEAD.
    pub fn made_of(&self) -> Option<(Cipher, &Key)> {
        self.made_of.as_ref().map(|(c, k)| (*c, &***k))
    }

    /// Encrypts `plain` into `out` (plain.len() + 16 bytes); returns the bytes written.
    #[inline]
    pub fn seal(&self, counter: u64, ad: &[u8], plain: &[u8], out: &mut [u8]) -> usize {
        let nonce = nonce(counter);
        match (&self.keyed, &self.made_of) {
            (Keyed::Accelerated(gcm), _) => gcm.seal(&nonce, ad, plain, out),
            (Keyed::AwsLc(context), Some((Cipher::ChaCha20Poly1305, key))) => {
                accelerated::seal(key, &nonce, ad, plain, out)
                    .unwrap_or_else(|| context.seal(&nonce, ad, plain, out))
            }
            (Keyed::AwsLc(context), _) => context.seal(&nonce, ad, plain, out),
        }
    }

    /// Decrypts `data` (ciphertext and tag) in place; returns the plaintext length.
    #[inline]
    pub fn open(&self, counter: u64, ad: &[u8], data: &mut [u8]) -> Result<usize, Forged> {
        let nonce = nonce(counter);
        match (&self.keyed, &self.made_of) {
            (Keyed::Accelerated(gcm), _) => gcm.open(&nonce, ad, data),
            (Keyed::AwsLc(context), Some((Cipher::ChaCha20Poly1305, key))) => {
                accelerated::open(key, &nonce, ad, data).unwrap_or_else(|| context.open(&nonce, ad, data))
            }
            (Keyed::AwsLc(context), _) => context.open(&nonce, ad, data),
        }
    }
}

impl Context {
    fn of(cipher: Cipher, key: &Key) -> Self {
        // SAFETY: the getter returns a pointer to static data.
        let alg = unsafe {
            match cipher {
                Cipher::ChaCha20Poly1305 => lc::EVP_aead_chacha20_poly1305(),
                Cipher::Aes256Gcm => lc::EVP_aead_aes_256_gcm(),
            }
        };
        Self::with_algorithm(alg, key)
    }

    fn xchacha(key: &Key) -> Self {
        // SAFETY: the getter returns a pointer to static data.
        Self::with_algorithm(unsafe { lc::EVP_aead_xchacha20_poly1305() }, key)
    }

    fn with_algorithm(alg: *const lc::EVP_AEAD, key: &Key) -> Self {
        // SAFETY: `alg` is static, `key` is 32 bytes, which every algorithm used here takes.
        let ctx = unsafe { lc::EVP_AEAD_CTX_new(alg, key.as_ptr(), key.len(), TAG_LEN) };
        // Null only when malloc fails: nothing sensible is left to do then.
        Self(NonNull::new(ctx).expect("out of memory for an AEAD context"))
    }

    fn seal(&self, nonce: &[u8], ad: &[u8], plain: &[u8], out: &mut [u8]) -> usize {
        let mut written = 0usize;
        assert!(out.len() >= plain.len() + TAG_LEN);
        // SAFETY: all pointers come with their slice's length; `out` and `plain` are distinct
        // borrows, so they do not overlap; the context is valid while self lives.
        let ok = unsafe {
            lc::EVP_AEAD_CTX_seal(
                self.0.as_ptr(),
                out.as_mut_ptr(),
                &mut written,
                out.len(),
                nonce.as_ptr(),
                nonce.len(),
                plain.as_ptr(),
                plain.len(),
                ad.as_ptr(),
                ad.len(),
            )
        };
        assert!(ok == 1 && written == plain.len() + TAG_LEN, "AEAD seal refused valid lengths");
        written
    }

    fn open(&self, nonce: &[u8], ad: &[u8], data: &mut [u8]) -> Result<usize, Forged> {
        let mut written = 0usize;
        // SAFETY: in-place operation with out == in is allowed by the library; lengths are the
        // slice's own; on failure the library zeroes the output.
        let ok = unsafe {
            lc::EVP_AEAD_CTX_open(
                self.0.as_ptr(),
                data.as_mut_ptr(),
                &mut written,
                data.len(),
                nonce.as_ptr(),
                nonce.len(),
                data.as_ptr(),
                data.len(),
                ad.as_ptr(),
                ad.len(),
            )
        };
        if ok == 1 {
            Ok(written)
        } else {
            // SAFETY: clears this thread's error queue, which the failed open appended to.
            unsafe { lc::ERR_clear_error() };
            Err(Forged)
        }
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: made by EVP_AEAD_CTX_new, freed once; free wipes the allocation.
        unsafe { lc::EVP_AEAD_CTX_free(self.0.as_ptr()) }
    }
}

/// 32 zero bits and the counter, little-endian (WireGuard whitepaper, 5.4.6).
#[inline]
pub fn nonce(counter: u64) -> [u8; 12] {
    let mut n = [0u8; 12];
    n[4..].copy_from_slice(&counter.to_le_bytes());
    n
}

/// XChaCha20-Poly1305 seal, for cookie replies.
pub fn xchacha_seal(key: &Key, nonce: &[u8; 24], ad: &[u8], plain: &[u8], out: &mut [u8]) {
    Context::xchacha(key).seal(nonce, ad, plain, out);
}

/// XChaCha20-Poly1305 open, for cookie replies.
pub fn xchacha_open(key: &Key, nonce: &[u8; 24], ad: &[u8], data: &mut [u8]) -> Result<usize, Forged> {
    Context::xchacha(key).open(nonce, ad, data)
}

/// An X25519 private key, clamped, wiped on drop.
#[derive(Clone)]
pub struct SecretKey(Zeroizing<Key>);

impl SecretKey {
    pub fn from_bytes(mut bytes: Key) -> Self {
        bytes[0] &= 248;
        bytes[31] = (bytes[31] & 127) | 64;
        let s = Self(Zeroizing::new(bytes));
        bytes.zeroize();
        s
    }

    pub fn random() -> Self {
        let mut b = Zeroizing::new([0u8; 32]);
        random(&mut b[..]);
        Self::from_bytes(*b)
    }

    pub fn expose(&self) -> &Key {
        &self.0
    }

    pub fn public(&self) -> Key {
        let mut out = [0u8; 32];
        // SAFETY: both buffers are 32 bytes.
        unsafe { lc::X25519_public_from_private(out.as_mut_ptr(), self.0.as_ptr()) };
        out
    }

    /// Shared secret, or `Forged` when the other key is of low order (all-zero result).
    pub fn dh(&self, public: &Key) -> Result<Zeroizing<Key>, Forged> {
        let mut out = Zeroizing::new([0u8; 32]);
        // SAFETY: all buffers are 32 bytes.
        let ok = unsafe { lc::X25519(out.as_mut_ptr(), self.0.as_ptr(), public.as_ptr()) };
        if ok == 1 {
            Ok(out)
        } else {
            Err(Forged)
        }
    }
}

/// BLAKE2s-256 of the concatenation of `parts`.
pub fn hash(parts: &[&[u8]]) -> Key {
    let mut h = Blake2s256::new();
    for p in parts {
        Digest::update(&mut h, p);
    }
    h.finalize().into()
}

/// Keyed BLAKE2s with a 16-byte output (mac1, mac2, cookie).
pub fn mac16(key: &[u8], parts: &[&[u8]]) -> [u8; 16] {
    let mut m = <Blake2sMac<U16> as KeyInit>::new_from_slice(key).expect("key is at most 32 bytes");
    for p in parts {
        Update::update(&mut m, p);
    }
    m.finalize_fixed().into()
}

/// Constant-time check of `mac16`.
pub fn mac16_matches(key: &[u8], parts: &[&[u8]], tag: &[u8]) -> bool {
    let mut m = <Blake2sMac<U16> as KeyInit>::new_from_slice(key).expect("key is at most 32 bytes");
    for p in parts {
        Update::update(&mut m, p);
    }
    m.verify_slice(tag).is_ok()
}

/// HMAC-BLAKE2s-256 (RFC 2104 with a 64-byte block).
pub fn hmac(key: &[u8], parts: &[&[u8]]) -> Zeroizing<Key> {
    let mut pad = Zeroizing::new([0x36u8; 64]);
    for (p, k) in pad.iter_mut().zip(key) {
        *p ^= k;
    }
    let mut h = Blake2s256::new();
    Digest::update(&mut h, &pad[..]);
    for p in parts {
        Digest::update(&mut h, p);
    }
    let inner = Zeroizing::new(<[u8; 32]>::from(h.finalize()));
    for p in pad.iter_mut() {
        *p ^= 0x36 ^ 0x5c;
    }
    Zeroizing::new(hash(&[&pad[..], &inner[..]]))
}

/// WireGuard's KDF_n: HKDF with HMAC-BLAKE2s and no info (whitepaper 5.4).
pub fn kdf<const N: usize>(key: &Key, input: &[u8]) -> [Zeroizing<Key>; N] {
    let prk = hmac(key, &[input]);
    let mut out: [Zeroizing<Key>; N] = std::array::from_fn(|_| Zeroizing::new([0u8; 32]));
    for i in 0..N {
        let counter = [i as u8 + 1];
        out[i] =
            if i == 0 { hmac(&prk[..], &[&counter]) } else { hmac(&prk[..], &[&out[i - 1][..], &counter]) };
    }
    out
}

/// Fills `buf` from the kernel's generator.
pub fn random(buf: &mut [u8]) {
    let mut done = 0;
    while done < buf.len() {
        // SAFETY: the pointer and length describe the unfilled rest of `buf`.
        let n = unsafe { libc::getrandom(buf[done..].as_mut_ptr().cast(), buf.len() - done, 0) };
        if n > 0 {
            done += n as usize;
        } else {
            let e = std::io::Error::last_os_error();
            assert!(e.raw_os_error() == Some(libc::EINTR), "getrandom: {e}");
        }
    }
}

pub fn random_u32() -> u32 {
    let mut b = [0u8; 4];
    random(&mut b);
    u32::from_le_bytes(b)
}

/// Constant-time equality of two 32-byte values.
pub fn same_key(a: &Key, b: &Key) -> bool {
    // SAFETY: both arrays are 32 bytes.
    unsafe { lc::CRYPTO_memcmp(a.as_ptr().cast(), b.as_ptr().cast(), 32) == 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(s: &str) -> Vec<u8> {
        (0..s.len()).step_by(2).map(|i| u8::from_str_radix(&s[i..i + 2], 16).unwrap()).collect()
    }

    #[test]
    fn blake2s_rfc7693_vector() {
        let want = hex("508c5e8c327c14e2e1a72ba34eeb452f37458b209ed63a294d999b4c86675982");
        assert_eq!(hash(&[b"a", b"bc"]).to_vec(), want);
    }

    #[test]
    fn rfc7748_x25519_vector() {
        let k = hex("a546e36bf0527c9d3b16154b82465edd62144c0ac1fc5a18506a2244ba449ac4");
        let u = hex("e6db6867583030db3594c1a424b15f7c726624ec26b3353b10a903a6d0ab1c4c");
        let want = hex("c3da55379de9c6908e94ea4df28d084f32eccf03491c71f754b4075577a28552");
        let got = SecretKey::from_bytes(k[..].try_into().unwrap()).dh(u[..].try_into().unwrap()).unwrap();
        assert_eq!(got.to_vec(), want);
        let (a, b) = (SecretKey::random(), SecretKey::random());
        assert_eq!(*a.dh(&b.public()).unwrap(), *b.dh(&a.public()).unwrap());
    }

    #[test]
    fn low_order_keys_are_refused() {
        let s = SecretKey::random();
        assert!(s.dh(&[0; 32]).is_err());
        let mut one = [0u8; 32];
        one[0] = 1;
        assert!(s.dh(&one).is_err());
    }

    #[test]
    fn hmac_with_a_long_message_equals_parts() {
        assert_eq!(*hmac(b"k", &[b"ab", b"c"]), *hmac(b"k", &[b"abc"]));
    }

    /// Computed with CPython's hmac and hashlib.
    #[test]
    fn hmac_and_kdf_vectors() {
        let fox = b"The quick brown fox jumps over the lazy dog";
        assert_eq!(
            hmac(b"key", &[fox]).to_vec(),
            hex("f93215bb90d4af4c3061cd932fb169fb8bb8a91d0b4022baea1271e1323cd9a0")
        );
        let counting: Vec<u8> = (0..200).collect();
        let key: Key = std::array::from_fn(|i| i as u8);
        let cases: [(Key, &[u8], [&str; 3]); 3] = [
            (
                key,
                b"wireguard",
                [
                    "a011c5c91070042675cfd928591ae86bc328db3401844dfe636849847b77f12f",
                    "789a16a3efc975932db7ca3493d2e555a0d50821d160f686eb4caf578fa14e83",
                    "f886b70b72ba2b331d8d568f66bd5d8b319afea67c488688c7d371b3b4cc1655",
                ],
            ),
            (
                [0xff; 32],
                b"",
                [
                    "2242fd0f7a754a7597f2b500c91e28b9ccdad38b7b341d867eaeaf1e5f0768ec",
                    "6b767b8871518e98ddb3bac72e12e89d5b7f3a42b289a82ad66551c4b893b6b5",
                    "e9e562cb794059bcfdbf8abf3c3669b42c8d9cc47134773311ff467e00619339",
                ],
            ),
            (
                [0; 32],
                &counting,
                [
                    "4761dc1c82598fa6af4e87cedaf4de7e48b690dc59b9421e65f38bfe0a5c19be",
                    "9b42a2b55a3ca7bb81f0e80dd779e1254a0c72069dc00f8d74a4dfc3a4c0d9e7",
                    "6e695df6918fa2ac98b35b77c2789fceeed92065ac0887e99c5e7e38ddb51ca9",
                ],
            ),
        ];
        for (key, input, want) in cases {
            let got = kdf::<3>(&key, input);
            for (g, w) in got.iter().zip(want) {
                assert_eq!(g.to_vec(), hex(w));
            }
            assert_eq!(kdf::<1>(&key, input)[0], got[0]);
            assert_eq!(kdf::<2>(&key, input)[1], got[1]);
        }
    }

    #[test]
    fn aead_round_trip_and_forgery() {
        for cipher in [Cipher::ChaCha20Poly1305, Cipher::Aes256Gcm] {
            let k = Aead::new(cipher, &[7; 32]);
            let mut out = [0u8; 100 + TAG_LEN];
            assert_eq!(k.seal(9, b"", &[1; 100], &mut out), 116);
            let mut bad = out;
            bad[50] ^= 1;
            assert_eq!(k.open(9, b"", &mut bad), Err(Forged));
            assert_eq!(k.open(8, b"", &mut out.clone()), Err(Forged));
            assert_eq!(k.open(9, b"", &mut out), Ok(100));
            assert_eq!(out[..100], [1; 100]);
        }
    }

    #[test]
    fn chacha20poly1305_nonce_layout_is_rfc8439() {
        // RFC 8439 A.5-style check against an independent construction: same nonce bytes.
        assert_eq!(nonce(0x0102_0304_0506_0708), [0, 0, 0, 0, 8, 7, 6, 5, 4, 3, 2, 1]);
    }
}
