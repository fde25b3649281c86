//! Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s as WireGuard profiles it: bytes in, bytes out.
//!
//! No sockets, no clock, no peer table: the caller brings keys, the timestamp and randomness
//! (ephemeral keys) and looks peers up between the two halves of [`read_initiation`].
//! Message layouts: WireGuard whitepaper 5.4. The macs are added by `cookie`.

use zeroize::Zeroizing;

use crate::crypto::{hash, kdf, Aead, Cipher, Forged, Key, SecretKey};

pub const INITIATION_LEN: usize = 148;
pub const RESPONSE_LEN: usize = 92;
pub const TYPE_INITIATION: u8 = 1;
pub const TYPE_RESPONSE: u8 = 2;
pub const TYPE_COOKIE: u8 = 3;
pub const TYPE_DATA: u8 = 4;

const CONSTRUCTION: &[u8] = b"Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s";
const IDENTIFIER: &[u8] = b"WireGuard v1 zx2c4 Jason@zx2c4.com";
/// Separates the PSK of a non-default cipher from every plain one.
const CIPHER_LABEL: &[u8] = b"retinue transport cipher v1";

/// TAI64N timestamp: 8 bytes of seconds, 4 of nanoseconds, big endian, so byte order is time order.
pub type Timestamp = [u8; 12];

/// TAI64N of a wall-clock time. Nanoseconds are coarsened to 2^24 so they do not reveal more than needed.
pub fn tai64n(secs: u64, nanos: u32) -> Timestamp {
    let mut t = [0u8; 12];
    t[..8].copy_from_slice(&(0x4000_0000_0000_000a_u64.wrapping_add(secs)).to_be_bytes());
    t[8..].copy_from_slice(&(nanos & !0x00ff_ffff).to_be_bytes());
    t
}

/// The value for the PSK slot: the PSK itself for plain WireGuard, else bound to the cipher, so
/// two ends that disagree on the cipher never get a session.
pub fn psk_for(cipher: Cipher, psk: &Key) -> Zeroizing<Key> {
    match cipher {
        Cipher::ChaCha20Poly1305 => Zeroizing::new(*psk),
        other => Zeroizing::new(hash(&[CIPHER_LABEL, psk, other.name().as_bytes()])),
    }
}

/// Both directions of a derived session.
pub struct TransportKeys {
    pub send: Aead,
    pub recv: Aead,
}

/// What the initiator keeps between initiation and response.
pub struct Initiation {
    pub(crate) chain: Zeroizing<Key>,
    pub(crate) hash: Key,
    pub(crate) ephemeral: SecretKey,
    pub local_index: u32,
}

/// What the responder learns from the first half of an initiation.
pub struct Received {
    chain: Zeroizing<Key>,
    hash: Key,
    ephemeral: Key,
    encrypted_timestamp: [u8; 28],
    /// Static key of the sender, authenticated as known to the sender only after `finish`.
    pub peer: Key,
    pub remote_index: u32,
}

fn start(responder_static: &Key) -> (Key, Key) {
    let chain = hash(&[CONSTRUCTION]);
    let h = hash(&[&chain, IDENTIFIER]);
    (chain, hash(&[&h, responder_static]))
}

fn seal(key: &Key, ad: &Key, plain: &[u8], out: &mut [u8]) {
    Aead::new(Cipher::ChaCha20Poly1305, key).seal(0, ad, plain, out);
}

fn open(key: &Key, ad: &Key, data: &mut [u8]) -> Result<(), Forged> {
    Aead::new(Cipher::ChaCha20Poly1305, key).open(0, ad, data).map(|_| ())
}

fn le32(b: &[u8]) -> u32 {
    u32::from_le_bytes([b[0], b[1], b[2], b[3]])
}

/// Writes an initiation without macs into `out[..116]`. `static_static` is DH(local, peer).
pub fn write_initiation(
    local: &Key,
    peer: &Key,
    static_static: &Key,
    ephemeral: SecretKey,
    timestamp: &Timestamp,
    local_index: u32,
    out: &mut [u8; INITIATION_LEN],
) -> Result<Initiation, Forged> {
    let (chain, h) = start(peer);
    let mut chain = Zeroizing::new(chain);
    let e = ephemeral.public();
    out.fill(0);
    out[0] = TYPE_INITIATION;
    out[4..8].copy_from_slice(&local_index.to_le_bytes());
    out[8..40].copy_from_slice(&e);
    let h = hash(&[&h, &e]);
    let [c] = kdf::<1>(&chain, &e);
    chain = c;
    let [c, k] = kdf::<2>(&chain, &ephemeral.dh(peer)?[..]);
    chain = c;
    seal(&k, &h, local, &mut out[40..88]);
    let h = hash(&[&h, &out[40..88]]);
    let [c, k] = kdf::<2>(&chain, static_static);
    chain = c;
    seal(&k, &h, timestamp, &mut out[88..116]);
    let h = hash(&[&h, &out[88..116]]);
    Ok(Initiation { chain, hash: h, ephemeral, local_index })
}

/// First half of the responder: decrypts the sender's static key. One DH.
pub fn read_initiation(
    local: &SecretKey,
    local_public: &Key,
    msg: &[u8; INITIATION_LEN],
) -> Result<Received, Forged> {
    let (chain, h) = start(local_public);
    let e: Key = msg[8..40].try_into().expect("fixed length");
    let h = hash(&[&h, &e]);
    let [chain] = kdf::<1>(&chain, &e);
    let [chain, k] = kdf::<2>(&chain, &local.dh(&e)?[..]);
    let mut sealed: [u8; 48] = msg[40..88].try_into().expect("fixed length");
    let next = hash(&[&h, &sealed]);
    open(&k, &h, &mut sealed)?;
    Ok(Received {
        chain,
        hash: next,
        ephemeral: e,
        encrypted_timestamp: msg[88..116].try_into().expect("fixed length"),
        peer: sealed[..32].try_into().expect("fixed length"),
        remote_index: le32(&msg[4..8]),
    })
}

impl Received {
    /// Second half: proves the sender holds the static key and yields its timestamp.
    pub fn timestamp(&mut self, static_static: &Key) -> Result<Timestamp, Forged> {
        let [chain, k] = kdf::<2>(&self.chain, static_static);
        let mut sealed = self.encrypted_timestamp;
        let next = hash(&[&self.hash, &sealed]);
        open(&k, &self.hash, &mut sealed)?;
        self.chain = chain;
        self.hash = next;
        Ok(sealed[..12].try_into().expect("fixed length"))
    }

    /// Writes the response without macs into `out[..60]` and derives the session.
    pub fn write_response(
        self,
        psk: &Key,
        cipher: Cipher,
        ephemeral: SecretKey,
        local_index: u32,
        out: &mut [u8; RESPONSE_LEN],
    ) -> Result<TransportKeys, Forged> {
        let e = ephemeral.public();
        out.fill(0);
        out[0] = TYPE_RESPONSE;
        out[4..8].copy_from_slice(&local_index.to_le_bytes());
        out[8..12].copy_from_slice(&self.remote_index.to_le_bytes());
        out[12..44].copy_from_slice(&e);
        let h = hash(&[&self.hash, &e]);
        let [chain] = kdf::<1>(&self.chain, &e);
        let [chain] = kdf::<1>(&chain, &ephemeral.dh(&self.ephemeral)?[..]);
        let [chain] = kdf::<1>(&chain, &ephemeral.dh(&self.peer)?[..]);
        let [chain, tau, k] = kdf::<3>(&chain, &psk_for(cipher, psk)[..]);
        let h = hash(&[&h, &tau[..]]);
        seal(&k, &h, &[], &mut out[44..60]);
        let [to_responder, to_initiator] = kdf::<2>(&chain, &[]);
        Ok(TransportKeys { send: Aead::new(cipher, &to_initiator), recv: Aead::new(cipher, &to_responder) })
    }
}

impl Initiation {
    /// Checks a response and derives the session; returns it with the responder's index.
    pub fn read_response(
        &self,
        local: &SecretKey,
        psk: &Key,
        cipher: Cipher,
        msg: &[u8; RESPONSE_LEN],
    ) -> Result<(TransportKeys, u32), Forged> {
        let e: Key = msg[12..44].try_into().expect("fixed length");
        let h = hash(&[&self.hash, &e]);
        let [chain] = kdf::<1>(&self.chain, &e);
        let [chain] = kdf::<1>(&chain, &self.ephemeral.dh(&e)?[..]);
        let [chain] = kdf::<1>(&chain, &local.dh(&e)?[..]);
        let [chain, tau, k] = kdf::<3>(&chain, &psk_for(cipher, psk)[..]);
        let h = hash(&[&h, &tau[..]]);
        let mut empty: [u8; 16] = msg[44..60].try_into().expect("fixed length");
        open(&k, &h, &mut empty)?;
        let [to_responder, to_initiator] = kdf::<2>(&chain, &[]);
        let keys =
            TransportKeys { send: Aead::new(cipher, &to_responder), recv: Aead::new(cipher, &to_initiator) };
        Ok((keys, le32(&msg[4..8])))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crypto::random_u32;

    const PARAMS: &str = "Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s";

    struct Pair {
        a: SecretKey,
        b: SecretKey,
        psk: Key,
    }

    fn pair() -> Pair {
        Pair { a: SecretKey::random(), b: SecretKey::random(), psk: [5; 32] }
    }

    fn run(p: &Pair, ca: Cipher, cb: Cipher) -> Result<(TransportKeys, TransportKeys), Forged> {
        let (pa, pb) = (p.a.public(), p.b.public());
        let mut m1 = [0u8; INITIATION_LEN];
        let ss = p.a.dh(&pb)?;
        let init = write_initiation(&pa, &pb, &ss, SecretKey::random(), &tai64n(1, 2), 11, &mut m1)?;
        let mut rx = read_initiation(&p.b, &pb, &m1)?;
        assert_eq!((rx.peer, rx.remote_index), (pa, 11));
        assert_eq!(rx.timestamp(&*p.b.dh(&pa)?)?, tai64n(1, 2));
        let mut m2 = [0u8; RESPONSE_LEN];
        let kb = rx.write_response(&p.psk, cb, SecretKey::random(), 22, &mut m2)?;
        let (ka, idx) = init.read_response(&p.a, &p.psk, ca, &m2)?;
        assert_eq!(idx, 22);
        Ok((ka, kb))
    }

    fn crosses(tx: &Aead, rx: &Aead) -> bool {
        let mut ct = [0u8; 48];
        tx.seal(77, b"", &[3; 32], &mut ct);
        rx.open(77, b"", &mut ct).is_ok()
    }

    #[test]
    fn both_ends_derive_the_same_keys() {
        for c in [Cipher::ChaCha20Poly1305, Cipher::Aes256Gcm] {
            let (ka, kb) = run(&pair(), c, c).unwrap();
            assert!(crosses(&ka.send, &kb.recv) && crosses(&kb.send, &ka.recv));
            assert!(!crosses(&ka.send, &ka.recv));
        }
    }

    #[test]
    fn cipher_disagreement_gives_no_session() {
        assert!(run(&pair(), Cipher::Aes256Gcm, Cipher::ChaCha20Poly1305).is_err());
        assert!(run(&pair(), Cipher::ChaCha20Poly1305, Cipher::Aes256Gcm).is_err());
    }

    #[test]
    fn every_flipped_byte_is_refused() {
        let p = pair();
        let (pa, pb) = (p.a.public(), p.b.public());
        let ss = p.a.dh(&pb).unwrap();
        let mut m1 = [0u8; INITIATION_LEN];
        write_initiation(&pa, &pb, &ss, SecretKey::random(), &tai64n(1, 2), 11, &mut m1).unwrap();
        for i in 8..116 {
            let mut bad = m1;
            bad[i] ^= 1;
            let r = read_initiation(&p.b, &pb, &bad).and_then(|mut r| r.timestamp(&ss));
            // The top bit of an X25519 public key is ignored by the curve but is hashed, so it fails too.
            assert!(r.is_err(), "byte {i}");
        }
    }

    #[test]
    fn snow_is_our_peer_in_both_roles() {
        let p = pair();
        let (pa, pb) = (p.a.public(), p.b.public());
        let ss = p.a.dh(&pb).unwrap();
        // We initiate, snow responds.
        let mut m1 = [0u8; INITIATION_LEN];
        let ts = tai64n(1_700_000_000, 5 << 24);
        let init = write_initiation(&pa, &pb, &ss, SecretKey::random(), &ts, random_u32(), &mut m1).unwrap();
        let build = |key: &SecretKey, remote: Option<&Key>| {
            let b = snow::Builder::new(PARAMS.parse().unwrap())
                .local_private_key(key.expose())
                .unwrap()
                .prologue(IDENTIFIER)
                .unwrap()
                .psk(2, &p.psk)
                .unwrap();
            match remote {
                Some(r) => b.remote_public_key(r).unwrap().build_initiator().unwrap(),
                None => b.build_responder().unwrap(),
            }
        };
        let mut snow_b = build(&p.b, None);
        let mut buf = [0u8; 200];
        let n = snow_b.read_message(&m1[8..116], &mut buf).unwrap();
        assert_eq!(buf[..n], ts);
        assert_eq!(snow_b.get_remote_static().unwrap(), pa);
        let n = snow_b.write_message(&[], &mut buf).unwrap();
        assert_eq!(n, 48);
        let mut m2 = [0u8; RESPONSE_LEN];
        m2[12..60].copy_from_slice(&buf[..48]);
        let (keys, _) = init.read_response(&p.a, &p.psk, Cipher::ChaCha20Poly1305, &m2).unwrap();
        let mut t = snow_b.into_stateless_transport_mode().unwrap();
        let mut ct = [0u8; 21];
        keys.send.seal(4, b"", b"hello", &mut ct);
        let n = t.read_message(4, &ct, &mut buf).unwrap();
        assert_eq!(&buf[..n], b"hello");
        let n = t.write_message(6, b"world", &mut buf).unwrap();
        assert_eq!(keys.recv.open(6, b"", &mut buf[..n]), Ok(5));
        // Snow initiates, we respond.
        let mut snow_a = build(&p.a, Some(&pb));
        let n = snow_a.write_message(&ts, &mut buf).unwrap();
        let mut m1 = [0u8; INITIATION_LEN];
        m1[8..8 + n].copy_from_slice(&buf[..n]);
        let mut rx = read_initiation(&p.b, &pb, &m1).unwrap();
        assert_eq!(rx.timestamp(&ss).unwrap(), ts);
        let mut m2 = [0u8; RESPONSE_LEN];
        let keys =
            rx.write_response(&p.psk, Cipher::ChaCha20Poly1305, SecretKey::random(), 1, &mut m2).unwrap();
        snow_a.read_message(&m2[12..60], &mut buf).unwrap();
        t = snow_a.into_stateless_transport_mode().unwrap();
        keys.send.seal(0, b"", b"hello", &mut ct);
        let n = t.read_message(0, &ct, &mut buf).unwrap();
        assert_eq!(&buf[..n], b"hello");
    }

    /// The bytes on the wire, against an independent Noise with the same ephemeral keys and an
    /// independent reading of the framing and of mac1.
    #[test]
    fn handshake_bytes_are_stock_wireguard_s_whatever_cipher_is_wanted() {
        use blake2::digest::Digest;
        for cipher in [Cipher::ChaCha20Poly1305, Cipher::Aes256Gcm] {
            let p = pair();
            let (pa, pb) = (p.a.public(), p.b.public());
            let ss = p.a.dh(&pb).unwrap();
            let (ea, eb) = (SecretKey::random(), SecretKey::random());
            let ts = tai64n(1_700_000_000, 7 << 24);
            let psk = psk_for(cipher, &p.psk);
            assert_eq!(*psk == p.psk, cipher == Cipher::ChaCha20Poly1305);
            let builder = |key: &SecretKey, e: &SecretKey| {
                snow::Builder::new(PARAMS.parse().unwrap())
                    .local_private_key(key.expose())
                    .unwrap()
                    .prologue(IDENTIFIER)
                    .unwrap()
                    .psk(2, &psk)
                    .unwrap()
                    .fixed_ephemeral_key_for_testing_only(&e.expose()[..])
                    .remote_public_key(&pb)
                    .unwrap()
                    .build_initiator()
                    .unwrap()
            };
            let mut theirs = builder(&p.a, &ea);
            let mut noise = [0u8; 200];
            let n = theirs.write_message(&ts, &mut noise).unwrap();
            assert_eq!(n, 108);
            let mut want = vec![1, 0, 0, 0, 0x44, 0x33, 0x22, 0x11];
            want.extend_from_slice(&noise[..n]);
            let key = blake2::Blake2s256::new().chain_update(b"mac1----").chain_update(pb).finalize();
            want.extend_from_slice(&crate::crypto::mac16(&key, &[&want.clone()]));
            want.extend_from_slice(&[0; 16]);

            let mut m1 = [0u8; INITIATION_LEN];
            let init = write_initiation(&pa, &pb, &ss, ea, &ts, 0x1122_3344, &mut m1).unwrap();
            crate::cookie::Sender::default().add_macs(1, &pb, &mut m1);
            assert_eq!(m1.to_vec(), want, "{cipher:?}");

            let mut rx = read_initiation(&p.b, &pb, &m1).unwrap();
            rx.timestamp(&ss).unwrap();
            let mut m2 = [0u8; RESPONSE_LEN];
            let e_public = eb.public();
            rx.write_response(&p.psk, cipher, eb, 0x5566_7788, &mut m2).unwrap();
            assert_eq!(m2[..12], [2, 0, 0, 0, 0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11]);
            assert_eq!(m2[12..44], e_public);
            assert_eq!(theirs.read_message(&m2[12..60], &mut noise).unwrap(), 0, "{cipher:?}");
            assert!(init.read_response(&p.a, &p.psk, cipher, &m2).is_ok());
        }
    }

    #[test]
    fn timestamps_order_as_bytes() {
        assert!(tai64n(10, 0) < tai64n(10, 1 << 24));
        assert!(tai64n(10, 999_999_999) < tai64n(11, 0));
        assert_eq!(tai64n(0, 0)[..8], [0x40, 0, 0, 0, 0, 0, 0, 10]);
    }
}
